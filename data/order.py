"""Which images a training step sees, and how they are flipped: functions of the seed and the step alone.

So a run continues at any step, with any number of ranks and loader processes, as if it had never stopped.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset


def seed_of(*parts: int | str) -> int:
    """Return an integer of 32 bits for torch.manual_seed; neighbouring parts give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def batches_from(
    step: int, steps: int, tall: Sequence[bool], batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Yield (epoch, image index) of this rank's share of every batch from `step` to the last one.

    tall: for each image, whether it is higher than wide; a batch, less padded, has only tall images or only others,
    except the last one of an epoch. `batch_size` counts over all ranks, each takes its slice. An epoch is a permutation
    of the images without the remainder that fills no batch.
    """
    share, epoch_steps = batch_size // world, len(tall) // batch_size
    for s in range(step, steps):
        epoch, position = divmod(s, epoch_steps)
        if s == step or position == 0:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
            drawn = torch.randperm(len(tall), generator=generator).tolist()
            order, filling = [], {True: [], False: []}
            # The remainder goes before grouping, or it would always be the rare orientation's.
            for i in drawn[: epoch_steps * batch_size]:
                batch = filling[bool(tall[i])]
                batch.append(i)
                if len(batch) == batch_size:
                    order += batch
                    batch.clear()
            order += filling[True] + filling[False]
        first = position * batch_size + rank * share
        yield [(epoch, i) for i in order[first : first + share]]


class SeededDataset(Dataset):
    """Sample (epoch, i): image i of `dataset`, with random transforms that depend on seed, epoch and i alone.

    Reseeds the process's global generator, which is what torchvision's transforms draw from.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, i = key
        torch.manual_seed(seed_of(self.seed, "sample", epoch, i))
        return self.dataset[i]
