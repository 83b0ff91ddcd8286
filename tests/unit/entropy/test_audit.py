"""The metrics of an audit against brute force, and the watch that counts failures."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megamask.entropy.audit import Audit, captured_gain, overlap, spearman
from megamask.entropy.frequency import Frequency
from megamask.entropy.source import AuditConfig
from megamask.runtime import ranks
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.entropy.models import Asked, counts


def sequences(batch):
    """The maskable rows of each sequence."""
    home = batch.layout.sequence
    return [((home == s) & batch.maskable).nonzero().squeeze(1).tolist() for s in range(len(batch.layout.lengths))]


def top(values, rows, share):
    """The rows with the highest values, the first of equals first."""
    return set(sorted(rows, key=lambda row: (-values[row], row))[: round(share * len(rows))])


def average_ranks(values):
    """How many are lower, and half of those that are equal."""
    return [sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values]


LEVELS = st.sampled_from([3, 1000])  # many ties, few ties


def drawn(batch, levels, seed):
    draws = torch.Generator().manual_seed(seed)
    return (torch.randint(0, levels, (2, batch.layout.rows), generator=draws) / levels).unbind()


@example([12], 3, 0.05000000000000001, 0)  # half a row and a little more: in 32 bits it is half a row
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), LEVELS, st.floats(0.05, 0.9), st.integers(0, 1000))
def test_metrics_are_those_of_the_plainest_code(lengths, levels, share, seed):
    batch = pack(lengths, padding=6)
    predicted, exact = drawn(batch, levels, seed)
    metrics = overlap(predicted, exact, share, batch), spearman(predicted, exact, batch)
    captured = possible = 0.0
    for number, rows in enumerate(sequences(batch)):
        best, chosen = top(exact.tolist(), rows, share), top(predicted.tolist(), rows, share)
        expected = len(best & chosen) / len(best) if best else math.nan
        assert_close(metrics[0][number], torch.tensor(expected, dtype=torch.float64)) if best else None
        assert best or metrics[0][number].isnan()
        mean = float(exact[rows].double().mean()) if rows else 0.0
        captured += sum(float(exact[row]) - mean for row in chosen)
        possible += sum(float(exact[row]) - mean for row in best)
        a, b = (np.array(average_ranks(value[rows].tolist())) for value in (predicted, exact))
        if len(rows) > 1 and a.std() and b.std():
            assert_close(metrics[1][number], torch.tensor(np.corrcoef(a, b)[0, 1]))
        else:
            assert metrics[1][number].isnan()
    if possible > 1e-9:
        assert_close(
            captured_gain(predicted, exact, share, batch), torch.tensor(captured / possible, dtype=torch.float64)
        )


def test_the_exact_signal_is_perfect_and_its_contrary_the_worst():
    batch = pack([30, 20, 9], padding=3)
    exact = torch.randperm(batch.layout.rows).float()
    assert overlap(exact, exact, 0.2, batch).nanmean() == 1 == captured_gain(exact, exact, 0.2, batch)
    assert_close(spearman(exact, exact, batch).nanmean(), torch.tensor(1.0, dtype=torch.float64))
    assert_close(spearman(-exact, exact, batch).nanmean(), torch.tensor(-1.0, dtype=torch.float64))
    assert captured_gain(-exact, exact, 0.2, batch) < 0


def test_only_maskable_rows_and_only_order_inside_a_sequence_count():
    batch = pack([30, 20], padding=10)
    predicted, exact = torch.rand(2, batch.layout.rows).unbind()
    other = torch.where(batch.maskable, 5 * predicted.exp() + 100 * batch.layout.sequence, 1e6)
    assert torch.equal(
        overlap(predicted, exact, 0.3, batch).nan_to_num(), overlap(other, exact, 0.3, batch).nan_to_num()
    )
    assert torch.equal(captured_gain(predicted, exact, 0.3, batch), captured_gain(other, exact, 0.3, batch))
    assert torch.equal(spearman(predicted, exact, batch).nan_to_num(), spearman(other, exact, batch).nan_to_num())


def test_flat_entropies_have_no_metrics():
    batch = pack([30, 20])
    flat, rising = torch.ones(50), torch.arange(50.0)
    assert captured_gain(rising, flat, 0.2, batch).isnan() and spearman(rising, flat, batch).isnan().all()


# ---- the watch


def make_audit(signal="masked", ask=None, **config):
    config = AuditConfig(**{"every": 10, **config})
    return Audit(
        config, "probe", ask or Asked(), Frequency(counts()), signal=signal, passes=3, mask_id=IDS.mask, seed=1
    )


BATCH = pack([40, 60, 30], padding=5)


def test_metrics_and_the_ceiling():
    exact = Asked()
    predicted = make_audit("clean", exact)._exact(BATCH, "audit")
    audited = make_audit("clean")(BATCH, predicted, 0.2).metrics
    assert audited["audit/ceiling"] == audited["audit/gain"] == audited["audit/overlap"] == 1
    assert_close(torch.tensor(audited["audit/spearman"]), torch.tensor(1.0))
    audited = make_audit()(BATCH, predicted, 0.2).metrics
    assert 0 < audited["audit/ceiling"] < 1  # another drawing of the groups
    names = {"overlap", "gain", "spearman"}
    expected = names | {f"frequency_{n}" for n in names} | {"ceiling_overlap", "ceiling_spearman", "ceiling"}
    assert set(audited) == {f"audit/{name}" for name in expected | {"failures"}}


def test_the_metrics_of_frequency_are_those_of_the_functions():
    audit = make_audit("clean")
    exact, frequency = audit._exact(BATCH, "audit"), Frequency(counts())([BATCH])[0]
    audited = audit(BATCH, torch.rand(BATCH.layout.rows), 0.2).metrics
    assert math.isclose(audited["audit/frequency_overlap"], overlap(frequency, exact, 0.2, BATCH).nanmean())
    assert math.isclose(audited["audit/frequency_gain"], captured_gain(frequency, exact, 0.2, BATCH))
    assert math.isclose(audited["audit/frequency_spearman"], spearman(frequency, exact, BATCH).nanmean())


def test_only_rank_zero_decides(monkeypatch):
    predicted = torch.rand(BATCH.layout.rows)
    one = make_audit()(BATCH, predicted, 0.2).metrics
    sums: list[torch.Tensor] = []
    for rank in (1, 0):
        monkeypatch.setattr(ranks, "is_main", lambda rank=rank: rank == 0)
        monkeypatch.setattr(ranks, "sum", lambda values: sums.append(values) or torch.stack(sums).sum(0))
        several = make_audit()(BATCH, predicted if rank == 0 else -predicted, 0.2).metrics
    assert not sums[0].any() and several == one


def test_a_failing_source_is_reported_and_replaced_after_enough_failures():
    audit = make_audit("clean", fall_back=("exact",), patience=2)
    good, bad = audit._exact(BATCH, "audit"), -audit._exact(BATCH, "audit")
    assert audit(BATCH, bad, 0.2).sentence
    assert audit(BATCH, good, 0.2).sentence is None  # so failures are not in a row
    first, second = (audit(BATCH, bad, 0.2) for _ in range(2))
    assert (first.fall_back, audit.source, second.fall_back) == (None, "exact", "exact")
    assert "'probe'" in second.sentence and "From now on 'exact'" in second.sentence
    assert all(audit(BATCH, bad, 0.2).fall_back is None for _ in range(5))  # there is no other


def test_flat_text_neither_fails_nor_passes():
    audit = make_audit("clean", ask=lambda batch, plan: torch.ones(len(plan.targets)), fall_back=("exact",), patience=1)
    verdict = audit(BATCH, torch.rand(BATCH.layout.rows), 0.2)
    assert verdict.fall_back is None and "alike" in verdict.sentence
    assert all(math.isfinite(value) for value in verdict.metrics.values())


def test_it_resumes_where_it_was():
    bad = -make_audit("clean")._exact(BATCH, "audit")
    audit, resumed = (make_audit("clean", fall_back=("exact", "frequency"), patience=2) for _ in range(2))
    for _ in range(3):
        audit(BATCH, bad, 0.2)
    resumed.load_state_dict(audit.state_dict())
    assert resumed.source == audit.source == "exact"
    assert resumed(BATCH, bad, 0.2) == audit(BATCH, bad, 0.2)
    assert resumed.source == "frequency"


def test_it_is_due_every_so_often():
    assert [step for step in range(35) if make_audit().due(step)] == [10, 20, 30]
