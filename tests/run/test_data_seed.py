"""`data.seed`: runs of several seeds train on, and hold out, the same rows."""

import pytest

from eaftdrope.recipe.load import load_recipe
from eaftdrope.run.data import build_data
from eaftdrope.run.settings import eaft_settings
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def rows(project, *overrides):
    data = build_data(eaft_settings(load_recipe(project, overrides)), byte_tokenizer())
    return sorted(data.train["origin"]), sorted(data.held_out["origin"])


def test_a_share_follows_the_seed_of_the_data_and_not_of_the_training(project):
    share, seeds = "data.held_out=0.25", ("train.seed=1", "train.seed=2")
    drawn_by_train = [rows(project, share, seed) for seed in seeds]
    assert drawn_by_train[0] != drawn_by_train[1]
    fixed = [rows(project, share, "data.seed=7", seed) for seed in seeds]
    assert fixed[0] == fixed[1] == rows(project, share, "train.seed=7")
    train, held_out = fixed[0]
    assert not set(train) & set(held_out) and len(held_out) == 6


def test_so_do_the_rows_of_a_fractional_weight(project):
    weight = "data.train={path: rows.jsonl, weight: 0.5}"
    first, second = (rows(project, weight, "data.seed=7", f"train.seed={seed}")[0] for seed in (1, 2))
    assert first == second != rows(project, weight, "train.seed=1")[0]
