"""`train.py` and `medim train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import make_parser, quiet

HELP = """Train a model, or go on with a run that was stopped.

  python train.py configs/train/demo.yaml                              # goes on from the shipped demo checkpoint
  python train.py configs/train/demo.yaml train.steps=40 run_dir=R     # any setting can be changed: a.b=c
  accelerate launch --num_processes 8 train.py CONFIG                  # several GPUs

Run the same command again to resume after the last complete checkpoint. RUN_DIR/final is the trained model.
RUN_DIR/metrics.jsonl has a line a step: loss by modality and by noise level, samples/s, memory."""


def train(argv: Sequence[str]) -> int:
    """`train.py CONFIG [a.b=c ...]`."""
    parser = make_parser("train.py", HELP)
    parser.add_argument("config", help="a YAML file, as those in configs/train/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    from medim.config import dump, load
    from medim.recipe import TrainConfig, make_task

    config = load(args.config, args.overrides, TrainConfig)
    quiet()
    from medim.estimate import check_memory
    from medim.training.engine import make_accelerator, zero_stage
    from medim.training.loop import train as run_loop
    from medim.training.memory import Sharing
    from medim.training.processes import leave, multiplies_bf16

    o = config.train
    accelerator = make_accelerator(o.precision == "bf16" or (o.precision == "auto" and multiplies_bf16()), o.timeout)
    stage, offload = zero_stage(accelerator)
    check_memory(config, Sharing(accelerator.num_processes, stage, offload and stage == 3))
    with accelerator.main_process_first():  # one process encodes the data, the others find it there
        task = make_task(config)
    final = run_loop(accelerator, task, o, config.log, Path(config.run_dir), dump(config))
    if final is not None and accelerator.is_main_process:
        print(f"model: {final}")
    leave(accelerator)
    return 0


EXPORT = """Make a model folder of a training checkpoint, whatever number of processes wrote it.

  medim export runs/demo --out models/demo                                  # the newest checkpoint of a run
  medim export runs/demo/checkpoints/step-00000200 --out models/demo-200 --weights last --dtype bfloat16

It needs no GPU and no other process. The averaged weights are what evaluation and sampling are meant for."""


def export(argv: Sequence[str]) -> int:
    """`medim export CHECKPOINT --out DIR`."""
    parser = make_parser("medim export", EXPORT)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--weights", choices=("ema", "last"), default="ema", help="averaged, or those of the last step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    import torch

    from medim.errors import UserError
    from medim.training.checkpoint import Checkpoint
    from medim.training.checkpoint import export as write
    from medim.training.folders import STATE_NAME, latest_checkpoint

    chosen: Path | None = args.checkpoint
    if not (args.checkpoint / STATE_NAME).is_file():
        chosen = latest_checkpoint(args.checkpoint / "checkpoints", Checkpoint)
    if chosen is None:
        raise UserError(f"{args.checkpoint}: neither a checkpoint nor the folder of a run that has one")
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; remove it or choose another")
    field = "weight" if args.weights == "last" else "ema"
    write(chosen, args.out, field, getattr(torch, args.dtype))
    print(f"{args.out}: {args.weights} weights of {chosen}")
    return 0
