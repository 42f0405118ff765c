"""What test_ranks.py looks at, by two ranks of one torchrun: python -m torch.distributed.run two_ranks.py FOLDER.

FOLDER has the data set shapes/; results go beside it.
"""

import contextlib
import datetime
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch.distributed as dist

import eval as eval_script
import train
from data import DatasetError
from tests.support.runs import flags_of
from training.process import from_main, setup_distributed

# SGD, a backbone without batch norm, which would see each rank's share alone, and images of one size: group norm sees
# the padding, and an image is padded to the largest of its share.
WITHOUT_NORM = ("--backbone", "test_convnext", "--optimizer", "sgd", "--accumulate", 2, "--augment", "flip")
TIME_LIMIT_S, METRICS_S = 6, 10


def read_once(folder: Path, rank: int) -> None:
    def fail():
        raise DatasetError(f"rank {rank} cannot read")

    read = from_main(lambda: [rank] * 1000)
    try:
        from_main(fail)
    except DatasetError as error:
        (folder / f"read{rank}").write_text(f"{sum(read)}, {error}")


def call(script, *args) -> None:
    sys.argv = [f"{script.__name__}.py", *map(str, args)]
    script.main()


def train_until_a_signal(folder: Path, rank: int) -> None:
    """A SIGTERM reaches the second rank alone, in its third step."""
    rate = train.learning_rate

    def interrupted(step, *args):
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *args)

    with mock.patch.object(train, "learning_rate", interrupted), contextlib.suppress(SystemExit):
        call(train, *flags_of(folder / "shapes", folder / "stopped", *WITHOUT_NORM, steps=5))
    dist.destroy_process_group()


def let_metrics_outlast_the_time_limit() -> None:
    """Rank 0 computes the first metrics for longer than a collective may take."""
    start, metrics, delays_s = dist.init_process_group, eval_script.coco_metrics, iter((METRICS_S, 0, 0))
    limit = datetime.timedelta(seconds=TIME_LIMIT_S)
    dist.init_process_group = lambda *args, **more: start(*args, **more, timeout=limit)
    eval_script.coco_metrics = lambda *args: (time.sleep(next(delays_s)), metrics(*args))[1]


def main(folder: Path) -> None:
    rank = setup_distributed("cpu")[1]
    read_once(folder, rank)
    dist.destroy_process_group()
    train_until_a_signal(folder, rank)
    let_metrics_outlast_the_time_limit()
    call(train, *flags_of(folder / "shapes", folder / "out", "--eval-every", 1, steps=7))
    call(eval_script, "--weights", folder / "out" / "ota.safetensors", "--out", folder / "eval", "--device", "cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
