"""A training step that is recorded once and then replayed, kernels and all, by a single call.

A step of a small network is some hundred kernels of a few microseconds each: on a GPU it waits for Python to launch
them. A CUDA graph launches them all at once. Recorded are the kernels and the addresses that they read and write, so
what changes from step to step must lie in tensors that stay where they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

_LOGGER = logging.getLogger(__name__)

# (images, labels) of one batch -> figures of the step
Step = Callable[[Tensor, Tensor], Tensor]

_STEPS_BEFORE = 3  # until the optimiser's state exists and libraries have their workspace
RECORDING = threading.Lock()  # one graph at a time; torch's generators must not be seeded meanwhile


class ReplayedStep:
    """Calls a step as it is a few times, records it, and replays it from then on.

    All calls train, none is spent on the recording. A step that cannot be recorded, because it reads a value back to
    the host or decides by one, is called as it is; so are batches of another shape.

    Args:
        step: trains on one batch; everything else that it reads is the same tensor in every call.
        device: of the batches, a CUDA one.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._steps_done = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_refused = False

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch; what is returned is overwritten by the next call."""
        if self._graph is None and self._steps_done >= _STEPS_BEFORE and not self._is_refused:
            self._record(images, labels)
        self._steps_done += 1
        if self._graph is None or images.shape != self._images.shape:
            return self._call(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._outcome

    def _call(self, images: Tensor, labels: Tensor) -> Tensor:
        """The step on the stream that it is recorded on, where autograd then finds its accumulators."""
        current = torch.cuda.current_stream(images.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = self._step(images, labels)
        current.wait_stream(self._stream)
        return outcome

    def _record(self, images: Tensor, labels: Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        current = torch.cuda.stream(torch.cuda.current_stream(images.device))  # some torch versions leave theirs
        self._images, self._labels = images.clone(), labels.clone()
        try:
            with RECORDING, current, recording:
                self._outcome = self._step(self._images, self._labels)
        except RuntimeError as cause:
            self._is_refused = True
            first_line = str(cause).partition("\n")[0]
            _LOGGER.info("training steps are not replayed from a CUDA graph but launched one by one: %s", first_line)
        else:
            self._graph = graph
