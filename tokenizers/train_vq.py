"""Train a VQ image tokenizer, or go on with a run that was stopped.

python tokenizers/train_vq.py configs/tokenizer/demo.yaml                                     # 2 CPU cores
python tokenizers/train_vq.py configs/tokenizer/demo.yaml train.steps=60 run_dir=runs/try-vq  # small, on a CPU
accelerate launch --num_processes 8 tokenizers/train_vq.py configs/tokenizer/vq_256_f16.yaml data.root=DIR
"""

from medim.cli import run, train_vq

if __name__ == "__main__":
    raise SystemExit(run(train_vq))
