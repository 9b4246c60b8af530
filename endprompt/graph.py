"""CUDA graphs: work of fixed shapes is recorded once and replayed, so small models are not bound by kernel launches."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replayed:
    """A function without arguments or result that works on tensors in place; on CUDA its later calls are replays.

    Its first two calls run as written, on a stream of their own (libraries and torch.compile set themselves up there),
    the third records the work and replays it, as all later ones do. On a CPU every call runs as written.
    A recording holds what it was made with: addresses and shapes of tensors, and the values of Python numbers.
    Raises ValueError if the work cannot be recorded: it waits for the device, or its shapes depend on data.
    """

    WARM = 2

    def __init__(self, work: Callable[[], object], device: torch.device, warm: int = WARM):
        self.work, self.device, self.warm = work, device, warm
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.recording: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.stream is None:
            self.work()
            return
        if self.recording is None and self.warm > 0:
            self.warm -= 1
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.work()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.recording is None:
            self.recording = self._record()
        self.recording.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        recording = torch.cuda.CUDAGraph()
        try:
            # other threads prepare batches meanwhile: their calls are none of this recording's business
            with torch.cuda.graph(recording, stream=self.stream, capture_error_mode="thread_local"):
                self.work()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"this work cannot be recorded as a CUDA graph: {reason}") from error
        return recording
