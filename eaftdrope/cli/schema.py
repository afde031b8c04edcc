"""`eaftdrope schema`: the recipe's JSON schema."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON schema of a recipe. An editor with yaml-language-server completes and checks a recipe whose first
    line is `# yaml-language-server: $schema=recipe.schema.json`, after `eaftdrope schema > recipe.schema.json`."""
    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def json_schema() -> dict:
    """The JSON schema (draft 2020-12) of a recipe as a user may write it."""
    from eaftdrope.recipe import Recipe

    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "eaftdrope recipe"}
