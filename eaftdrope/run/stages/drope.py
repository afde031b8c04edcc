"""The stage drope: rotary embeddings become the identity.

It takes seconds and trains nothing; the converted folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass

from rich.console import Console
from transformers import PretrainedConfig

from eaftdrope.drope import convert, resolve_checkpoint
from eaftdrope.drope.layers import choose_layers
from eaftdrope.drope.llama_shaped import check_qk_norm
from eaftdrope.models import load_config
from eaftdrope.processes import is_main_process
from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.stage_sections import Drope

from ..launch import wait_for_everyone
from ..machine import versions
from ..plan import Lines, architecture, print_plan
from .stage import Progress, Stage


@dataclass(frozen=True)
class DropeStage(Stage[PretrainedConfig]):
    """Convert the recipe's model. `prepare` returns its configuration."""

    name = "drope"

    @property
    def section(self) -> Drope:
        return self.record.drope or Drope()

    def prepare(self, console: Console) -> PretrainedConfig:
        """See `Stage.prepare`.

        Raises:
            UserError: the architecture cannot be converted as the recipe requires.
        """
        # of the model itself, or of the one that it will be trained from
        model = self.readable_model
        config = load_config(model.reference, revision=model.revision, trust_remote_code=model.trust_remote_code)
        if self.section.qk_norm:
            check_qk_norm(config)
        console.print(f"\n{self.heading}", highlight=False, markup=False)
        print_plan(self.plan(config), console)
        return config

    def plan(self, prepared: PretrainedConfig) -> Lines:
        section, context = self.section, prepared.get_text_config().max_position_embeddings
        layers = choose_layers(section.layers, prepared)
        temperature = "" if section.temperature is None else f", temperature {section.temperature:g}"
        qk_norm = ", adds QK-norm" if section.qk_norm else ""
        return [
            ("model", f"{self.model.reference} ({architecture(prepared)})"),
            ("drops", f"the rotary embedding of layers {layers}{qk_norm}{temperature}"),
            ("context", f"{section.max_length or context:,} tokens announced, {context:,} before"),
            ("writes", f"{self.folder.path}/"),
        ]

    def run(self, prepared: PretrainedConfig, console: Console, *, command: str, progress: Progress) -> None:
        """Convert in the main process while the others wait.

        Raises:
            UserError: the model has no safetensors weights, or it cannot be converted as the recipe requires.
        """
        with progress.at("while converting"):
            # a late process must open the folder before the stage is finished in it: it would not wait here
            wait_for_everyone()
            if is_main_process():
                self._convert(console)
            wait_for_everyone()
            progress.changed = True

    def output_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """See `Stage.output_config`: the announced length, unless the model is converted already."""
        if getattr(config, "drope", None):
            return config
        planned = copy.deepcopy(config)
        text = planned.get_text_config()
        text.max_position_embeddings = self.section.max_length or text.max_position_embeddings
        return planned

    def _convert(self, console: Console) -> None:
        section, folder = self.section, self.folder.path
        console.print(f"\n{self.heading}", highlight=False, markup=False)
        source = resolve_checkpoint(self.model.reference, revision=self.model.revision)
        making = folder.with_name(f".{folder.name}.making")
        # left by a run that was killed while it converted
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        conversion = convert(
            source,
            making / folder.name,
            max_length=section.max_length,
            layers=section.layers,
            temperature=section.temperature,
            qk_norm=section.qk_norm,
        )
        for line in (*map(str, conversion.checks), *conversion.notes):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for later in self.later:
            later.discard()
        self.folder.take(making / folder.name, dump_recipe(self.record, folder=folder), versions())
        making.rmdir()
