"""Windows of several stores by turns, stage after stage: so many questions first, then documents and questions, ..."""

from collections.abc import Mapping, Sequence

import numpy as np

from lit_llama.data.layouts import Window
from lit_llama.data.packing import TrainingWindows
from lit_llama.errors import InputError


class MixedWindows:
    """A fixed course of windows from several sources; `windows[index]` for any index >= 0.

    Each source is read in the order of its own endless sequence, wherever its windows lie in the course, so that none
    comes again before its store is through. After its last window the course begins anew, with the sources' next ones.

    Args:
        sources: windows by name.
        stages: ((tokens, {source: share of them}), ...) in order. A source has at least one window in a stage that
            names it with a share above 0.
        seed: of the order within a stage.

    Raises:
        InputError: a stage that names a source which does not exist, or a course without a window.
    """

    replay_windows = 0  # replay is a source among others here
    bytes_per_target = None

    def __init__(
        self,
        sources: Mapping[str, TrainingWindows],
        stages: Sequence[tuple[float, Mapping[str, float]]],
        seed: int,
    ) -> None:
        self._sources = list(sources.values())
        names = list(sources)
        random = np.random.default_rng(seed)
        course = []
        for tokens, mix in stages:
            counts = np.zeros(len(names), dtype=np.int64)
            for name, share in mix.items():
                if name not in sources:
                    raise InputError(f"the plan mixes {name!r}, but there is only {', '.join(names)}")
                if share > 0:
                    counts[names.index(name)] = max(1, round(tokens * share / sources[name].tokens_per_window))
            stage = np.repeat(np.arange(len(names)), counts)
            random.shuffle(stage)
            course.append(stage)
        self._course = np.concatenate(course) if course else np.empty(0, dtype=np.int64)
        if not len(self._course):
            raise InputError("a plan without a single window: raise the number of tokens")
        # Which window of its source each is: how many of that source come before it.
        is_source = self._course[:, None] == np.arange(len(names))
        self._counts = is_source.sum(axis=0)
        self._numbers = np.take_along_axis(np.cumsum(is_source, axis=0), self._course[:, None], axis=1)[:, 0] - 1
        self.windows_per_epoch = len(self._course)
        self.windows_by_source = dict(zip(names, self._counts.tolist(), strict=True))
        self.name = " + ".join(names)

    def __getitem__(self, index: int) -> Window:
        """The window at `index` of the endless sequence."""
        if index < 0:
            raise IndexError(f"window {index}: the sequence starts at 0 and has no end")
        epoch, slot = divmod(index, self.windows_per_epoch)
        source = int(self._course[slot])
        return self._sources[source][epoch * int(self._counts[source]) + int(self._numbers[slot])]
