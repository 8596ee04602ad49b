"""Train a model, or go on with a run that was stopped.

python train.py configs/train/demo.yaml                                        # on from the shipped checkpoint, 5 min
python train.py configs/train/demo.yaml train.steps=40 run_dir=runs/try        # small, on a CPU
accelerate launch --num_processes 8 train.py configs/train/demo_scratch.yaml   # several GPUs
"""

from medim.cli import run, train

if __name__ == "__main__":
    raise SystemExit(run(train))
