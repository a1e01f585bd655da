"""A callback for Transformers' Trainer, which accepts only backends that accelerate lists."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pamm_compile.errors import UnsupportedTrainerError
from pamm_compile.torch_backend import backend

log = logging.getLogger("pamm_compile")


class PammCallback(TrainerCallback):
    """Compile the model that a Trainer trains, and log the report when training has ended.

    Equivalent to `model.compile(backend=pamm_compile.backend())` before training, also
    where the Trainer makes its model itself (`model_init`):

        Trainer(model, arguments, callbacks=[PammCallback()], train_dataset=…)

    The model is compiled in place, so checkpoints keep their names.

    Args:
        ratio: b / k, tokens per generator, at least 1, of PAMM.
        options: the other options of `pamm_compile.backend`.

    Attributes:
        backend: what it compiles with; its `report` says what was matched.

    Raises:
        InvalidOptionError: a value is not allowed, or a name is unknown.
    """

    def __init__(self, ratio: float | None = None, **options: Any) -> None:
        self.backend = backend(ratio, **options)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Compile the model in place.

        Raises:
            UnsupportedTrainerError: several GPUs in one process.
        """
        if args.n_gpu > 1:
            raise UnsupportedTrainerError(
                f"The Trainer has {args.n_gpu} GPUs in one process and would use nn.DataParallel, "
                "whose replicas call the compiled code of the original. Start one process per GPU "
                "with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to a single GPU."
            )
        assert model is not None, "a Trainer always has a model when training begins"
        model.compile(backend=self.backend)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the report: as a warning if nothing was compressed."""
        if state.is_world_process_zero:
            level = logging.INFO if self.backend.report.compressed else logging.WARNING
            log.log(level, "%s", self.backend.report)
