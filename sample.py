"""Make image-report pairs, reports for images, images for reports, or the missing parts of either.

python sample.py demo --task pair -n 4 --out out
python sample.py --help
"""

from medim.cli import run, sample

if __name__ == "__main__":
    raise SystemExit(run(sample))
