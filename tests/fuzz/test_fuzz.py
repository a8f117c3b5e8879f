"""The first cases of every kind, all thousand in the slow suite, and that the harness notices what it is there for."""

import random

import pytest

from mhc_jax import config as configs
from mhc_jax.config import fields
from mhc_jax.configs import CONFIGS
from mhc_jax.errors import UserError
from mhc_jax.typecheck import check_types

from . import config_fields, harness
from .harness import Wrong, run_all, run_kind, table
from .kinds import KINDS
from .rules import ENGRAM, SPARSE, known_fields, problems


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)
def test_the_first_cases(kind):
    tally = run_kind(kind, range(kind.SHORT), seed=1)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.cases == kind.SHORT


@pytest.mark.slow
def test_a_thousand_cases():
    tallies = run_all(KINDS, 1000, seed=0)
    assert not any(tally.wrong for tally in tallies), "\n".join(report for tally in tallies for report in tally.wrong)
    assert all(tally.accepted and tally.refused for tally in tallies), table(tallies)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rules_know_every_field_and_the_named_configs(name):
    values = dict(fields(CONFIGS[name]()))
    assert set(values) == known_fields(values)
    assert not problems(values)


def test_the_rules_know_every_field_of_engram_and_of_sparse_attention():
    values = dict(fields(config_fields.WITH_ENGRAM)), dict(fields(config_fields.WITH_SPARSE))
    assert [set(own) == known_fields(own) and not problems(own) for own in values] == [True, True]
    assert set(values[0]) >= set(ENGRAM)
    assert set(values[1]) >= set(SPARSE)


def test_validation_that_checks_only_types_is_noticed(monkeypatch):
    monkeypatch.setattr(configs, "validate", check_types)
    assert any("accepted, but wrong are" in report for report in run_kind(config_fields, range(40), seed=0).wrong)


def test_validation_that_refuses_everything_is_noticed(monkeypatch):
    def refuse(config):
        raise UserError("no")

    base = CONFIGS["laptop"]()
    monkeypatch.setattr(config_fields, "get", lambda name: base)
    monkeypatch.setattr(configs, "validate", refuse)
    assert any("refused, but it is valid" in report for report in run_kind(config_fields, range(40), seed=0).wrong)


class Scripted:
    """Cases that end as their number says."""

    NAME, SHARE, SHORT = "scripted", 1, 1

    def case(self, rng, room):
        def check():
            (room / "left").write_text("")
            number = len(self.seen)
            self.seen.append(rng.random())
            if number == 0:
                return harness.ACCEPTED
            if number == 4:
                while True:
                    pass
            raise [UserError("told"), Wrong("nonsense"), SystemExit(0), None, UserError(" ")][number - 1]

        return "a case", check

    def __init__(self):
        self.seen = []


def test_endings_are_told_apart_and_can_be_seen_again(monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 1)
    kind = Scripted()
    tally = run_kind(kind, range(6), seed=7)
    assert (tally.accepted, tally.refused, len(tally.wrong)) == (1, 1, 4)
    assert [word in report for word, report in zip(("nonsense", "SystemExit", "Hangs", "UserError"), tally.wrong)] == [True] * 4
    assert "python -m tests.fuzz --seed 7 --kind 'scripted' --case 2" in tally.wrong[0]
    assert kind.seen[2] == random.Random("7/scripted/2").random()
    assert "| scripted | 6 | 1 | 1 | 4 |" in table([tally])
