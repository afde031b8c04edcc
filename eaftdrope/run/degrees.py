"""How the processes of a launch share a training: tp x fsdp x dp, as the recipe or the launcher sets it.

    tp      processes that share every matrix (tensor parallelism, sharded by transformers when the model is loaded)
    fsdp    processes that the weights are sharded over (FSDP2, or DeepSpeed ZeRO-3)
    dp      replicas of all that

Processes of a tensor-parallel group have the same rows, so fsdp x dp ranks share the rows of a step. What a recipe sets is
put into the environment as `accelerate launch` puts its options there, and `Degrees.present` reads them from there: one
description, whoever made it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from eaftdrope.errors import UserError
from eaftdrope.processes import process_count
from eaftdrope.recipe.parallel_section import TP_OF_PRESET, Parallel

from .machine import sharding_engine, training_device

_TP, _REPLICAS = "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"
_SWITCHES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
# What `accelerate launch` makes of its options for FSDP2. Each process writes its shards of a checkpoint; the result is
# gathered whatever the type.
_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
_ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}


@dataclass(frozen=True)
class Degrees:
    """The degrees of a launch; `engine` is what shards over `fsdp` processes."""

    tp: int = 1
    fsdp: int = 1
    dp: int = 1
    engine: str = "FSDP2"

    @property
    def processes(self) -> int:
        return self.tp * self.fsdp * self.dp

    @property
    def ranks(self) -> int:
        """Data-parallel ranks: processes, or tensor-parallel groups of them, that share the rows of a step."""
        return self.fsdp * self.dp

    @property
    def text(self) -> str:
        """The degrees in the words of a plan: `8 processes: tp 2 x FSDP2 4, 4 data-parallel ranks`."""
        named = {"tp": self.tp, self.engine: self.fsdp, "replicas": self.dp}
        factors = " x ".join(f"{name} {size}" for name, size in named.items() if size > 1)
        return f"{self.processes} processes: {factors}, {self.ranks} data-parallel rank{'s' * (self.ranks > 1)}"

    @classmethod
    def present(cls) -> Degrees:
        """The degrees of this launch, from its environment."""
        processes = process_count()
        tp = int(os.environ.get(_TP, "1"))
        ranks = max(1, processes // tp)
        engine = sharding_engine()
        if engine is None and tp == 1:
            return cls(dp=ranks)
        dp = int(os.environ.get(_REPLICAS, "1"))
        return cls(tp, max(1, ranks // dp), dp, "ZeRO-3" if engine and engine.startswith("DeepSpeed") else "FSDP2")

    @classmethod
    def of(cls, section: Parallel, processes: int) -> Degrees | None:
        """The degrees that a recipe sets, for so many processes; None if it leaves them to the launcher.

        Raises:
            UserError: their product is not the number of processes.
        """
        if section.preset is None and not (section.tp or section.fsdp or section.dp):
            return None
        if section.preset and processes == 1:
            raise UserError(
                f"parallel: {section.preset} shares the weights over several processes, and this is one. Start it with "
                "`eaftdrope train RECIPE --launch N`, N being the number of GPUs, or with torchrun or accelerate launch."
            )
        if section.preset == "zero3":
            return cls(fsdp=processes, engine="ZeRO-3")
        tp = section.tp or (TP_OF_PRESET if section.preset == "tp_fsdp" else 1)
        fsdp, dp = section.fsdp, section.dp
        if section.preset:
            # the preset shards over what the other degrees leave
            fsdp, dp = fsdp or max(1, processes // (tp * (dp or 1))), dp or 1
        elif not dp:
            dp = 1 if tp > 1 else max(1, processes // (tp * (fsdp or 1)))
        found = cls(tp, fsdp or 1, dp)
        if found.processes != processes:
            raise UserError(_wrong_product(section, found, processes))
        return found


def _wrong_product(section: Parallel, found: Degrees, processes: int) -> str:
    least = prod(size or 1 for size in (found.tp, section.fsdp, section.dp))
    multiple = " or a multiple of it" if section.preset or (not section.dp and found.tp == 1) else ""
    started = "this is one process" if processes == 1 else f"{processes} were started"
    return (
        f"the degrees of parallel (tp {found.tp}, fsdp {section.fsdp or 1}, dp {section.dp or 1}) need {least} "
        f"processes{multiple}, and {started}. Start it with `eaftdrope train RECIPE --launch {least}`, or with torchrun or "
        "accelerate launch; or change the degrees."
    )


@contextmanager
def parallel_environment(section: Parallel, *, planned: int | None = None) -> Iterator[None]:
    """Describe the recipe's degrees in the environment for the duration of the block, as a launcher would.

    Args:
        planned: only plan for so many processes, whatever this machine's devices.

    Raises:
        UserError: the product of the degrees is not the number of processes, the launcher's configuration sets an engine too,
            or the engine does not work on this machine.
    """
    degrees = Degrees.of(section, planned or process_count())
    chosen = [name for variable, name in _SWITCHES.items() if os.environ.get(variable, "").lower() in ("true", "1")]
    if degrees and chosen:
        raise UserError(
            f"the launcher's configuration sets {' and '.join(chosen)}, and the recipe's section parallel does too. Leave "
            "the degrees and the preset of parallel out, or start the recipe with --launch or torchrun."
        )
    added = _variables(degrees) if degrees else {}
    if planned:
        added["WORLD_SIZE"] = str(planned)
    elif degrees and (
        engine := "tensor parallelism" if degrees.tp > 1 else degrees.engine if degrees.fsdp > 1 else None
    ):
        check_shards_here(engine)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _variables(degrees: Degrees) -> dict[str, str]:
    """The environment of the degrees."""
    if degrees.tp > 1:
        return {_TP: str(degrees.tp), _REPLICAS: str(degrees.dp)}
    if degrees.fsdp == 1:
        return {}
    if degrees.engine == "ZeRO-3":
        return {**_ZERO3}
    if degrees.dp == 1:
        return {**_FSDP2}
    sizes = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", _REPLICAS: str(degrees.dp)}
    return {**_FSDP2, **sizes, "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(degrees.fsdp)}


def check_shards_here(engine: str) -> None:
    """Check that accelerate has the engine on this machine's device.

    Raises:
        UserError: it is a CPU, where accelerate would train replicas instead, or refuse in other words.
    """
    if training_device().kind == "cpu":
        raise UserError(
            f"accelerate has {engine} on accelerators only, and this machine has none. Leave the degrees and the preset of "
            "parallel out: the processes then train replicas (DDP)."
        )
