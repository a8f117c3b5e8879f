"""The study of needles: its report from results that were never trained, and the whole of it at a tiny size."""

import json

import jax
import numpy as np
import pytest

from mhc_jax.errors import UserError
from mhc_jax.experiments import needle
from mhc_jax.experiments.document import Paragraph, Table
from mhc_jax.experiments.needle_report import LOOKS, needle_blocks
from mhc_jax.experiments.needle_task import Task
from mhc_jax.nn.decoder import Decoder

TINY = needle.Scale(Task(length=64, needles=4, keys=4, values=4, filler=4), top_k=16, batch=2, first=3, warmup=2, more=2)


def fake(scale=needle.FULL):
    results = {}
    for number, piece in enumerate(needle.pieces(scale)):
        own = 0.1 * number + 0.3
        sparse = piece.stage != "dense"
        results[piece.name] = {
            "stage": piece.stage,
            "begins": piece.begins,
            "steps": piece.steps,
            "rate": piece.rate,
            "loss": list(np.linspace(2, 2 - own, piece.steps)),
            "indexer_loss": [0.5 if sparse else None] * piece.steps,
            "accuracy": own,
            "answers": 2048,
            "by_depth": [own] * needle.DEPTHS,
            "seconds": 10.0,
        }
    return {"about": scale._asdict() | {"task": vars(scale.task)}, "pieces": results}


def test_every_piece_has_its_look():
    assert [piece.name for piece in needle.pieces(needle.FULL)] == list(LOOKS)


def test_the_report_of_given_results():
    blocks = needle_blocks(fake(), "mhc-jax study needle")
    accuracy, depth = (block for block in blocks if isinstance(block, Table))
    assert accuracy.rows[0] == ["dense", "–", "600", "30.0 % ± 1.0", "–", "10"]
    assert accuracy.rows[4] == ["dense, warm-up, sparse", "warm-up of the indexer", "150", "70.0 % ± 1.0", "0.500", "10"]
    assert len(depth.rows) == needle.DEPTHS
    assert depth.rows[0][:3] == ["0 to 12 %", "465", "30.0 %"]
    assert not any(isinstance(block, Paragraph) and block.note for block in blocks)


def test_a_partial_report_says_so():
    found = fake()
    del found["pieces"]["sparse from scratch"]
    notes = [block.text for block in needle_blocks(found, "") if isinstance(block, Paragraph) and block.note]
    assert notes == ["This report is partial; not trained yet: sparse from scratch."]


def test_a_finished_study_is_drawn_again_without_training(tmp_path, monkeypatch):
    (tmp_path / "needle.json").write_text(json.dumps(fake()))
    monkeypatch.setattr(needle, "train", lambda *_: pytest.fail("trained again"))
    needle.run(tmp_path, "", lambda line: None)
    assert (tmp_path / "figures" / "needle.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="results of other sizes"):
        needle.run(tmp_path, "", lambda line: None, TINY)


def test_the_baselines_differ_from_the_recipe_in_attention_alone():
    dense, on, scratch, warm, recipe, control = needle.pieces(needle.FULL)
    assert (dense.steps, dense.rate) == (scratch.steps, scratch.rate)
    assert (on.steps, on.rate) == (recipe.steps, recipe.rate) == (control.steps, control.rate)
    assert on.begins == warm.begins == control.begins == dense.name and recipe.begins == warm.name and control.frozen


@pytest.mark.slow
def test_the_study_end_to_end_at_a_tiny_size(tmp_path):
    needle.run(tmp_path, "mhc-jax study needle", lambda line: None, TINY)
    found = json.loads((tmp_path / "needle.json").read_text())["pieces"]
    assert all(np.isfinite(own["loss"]).all() for own in found.values())

    def leaves(name):
        with np.load(tmp_path / needle._file(name)) as arrays:
            return {key: arrays[key] for key in arrays.files}

    dense, warm, control = (leaves(name) for name in ("dense", "warm-up of the indexer", "sparse, indexer never trained"))
    recipe = leaves("dense, warm-up, sparse")
    of_indexer = [key for key in warm if ".indexer." in key]
    assert of_indexer and not any(".indexer." in key for key in dense)
    assert all((warm[key] == dense[key]).all() for key in dense)  # the warm-up moves nothing but the indexer
    assert any((warm[key] != control[key]).any() for key in of_indexer)
    assert any((recipe[key] != warm[key]).any() for key in of_indexer)
    assert any((control[key] != dense[key]).any() for key in dense)
    drawn = jax.jit(lambda: Decoder(needle.config_of(needle.pieces(TINY)[-1], TINY).model, jax.random.key(0)))()
    for path, leaf in jax.tree_util.tree_leaves_with_path(drawn):
        if (key := jax.tree_util.keystr(path)) in of_indexer:
            np.testing.assert_allclose(control[key], leaf, rtol=1e-5)  # never trained; compiled apart
