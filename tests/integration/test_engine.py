"""The loop's contracts, each on a whole training of a toy model in processes of its own."""

import json
import time

import pytest
import torch
from torch import nn


def weights(run):
    return torch.load(run / "export" / "model.pt", weights_only=True)


def curve(run, name="loss"):
    return [json.loads(line).get(name) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("toy") / "reference"
    assert toy(run).returncode == 0
    return run


def test_killed_run_continues_bit_for_bit(toy, reference, tmp_path):
    run = tmp_path / "run"
    assert toy(run, "--kill-after", 5).returncode != 0
    assert not (run / "export").exists()
    again = toy(run)
    assert again.returncode == 0, again.output
    assert "resumed at step 3/8" in again.output
    expected, actual = weights(reference), weights(run)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert curve(run) == curve(reference), "every step stands in metrics.jsonl once, with the same loss"


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_give_the_curve_of_one_rank_with_two_micro_batches(toy, reference, tmp_path, zero):
    run = tmp_path / "run"
    result = toy(run, "--zero", zero, ranks=2)
    assert result.returncode == 0, result.output
    # The same packs, summed in another order: fp32 rounding (6e-8 relative) through 8 AdamW steps.
    assert curve(run) == pytest.approx(curve(reference), rel=1e-5)
    assert curve(run, "adversary_loss")[2:] == pytest.approx(curve(reference, "adversary_loss")[2:], rel=1e-5)
    assert curve(run, "positive_loss") == pytest.approx(curve(reference, "positive_loss"), rel=1e-5)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    shares = {name: value for name, value in last.items() if name.endswith("_share")}
    assert shares["communication_share"] > 0 and min(shares.values()) >= 0 and sum(shares.values()) <= 1


def test_metrics_say_where_the_time_of_a_step_went(reference):
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        shares = [row[f"{part}_share"] for part in ("data", "forward", "backward", "optimizer")]
        assert all(share > 0 for share in shares) and sum(shares) < 1
        assert row["tflops_per_s"] > 0 and "mfu" not in row  # nobody knows what this CPU could do
    assert any("checkpoint_share" in row for row in rows)


def test_muon_moves_layer_matrices_by_a_nearly_orthogonal_step(toy, tmp_path):
    """Singular values of the first update: the rate of a step of warm-up (half of 0.02), sqrt(8 / 6) for the
    tall matrix, 0.9 of it in the average; Newton-Schulz leaves them within 0.68 to 1.13 of 1 (Jordan et al.). The first
    step has 5 samples, so the gradients have rank 5: the sixth is rounding of Newton-Schulz's bf16 products, which
    depends on the processor (0.013 was seen)."""
    assert toy(tmp_path / "run", "--optimizer", "muon", "--steps", 1).returncode == 0
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).state_dict()
    after = weights(tmp_path / "run")
    for name, scale in (("0.weight", (8 / 6) ** 0.5), ("2.weight", 1.0)):
        values = torch.linalg.svdvals(after[name] - start[name]) / (0.9 * 0.01 * scale)
        assert values[4] > 0.65 and values[0] < 1.16, values
        assert values[5] < 0.05, values


def test_muon_is_resumed_bit_for_bit_and_is_the_same_on_two_ranks(toy, tmp_path):
    assert toy(tmp_path / "one", "--optimizer", "muon").returncode == 0
    assert toy(tmp_path / "killed", "--optimizer", "muon", "--kill-after", 5).returncode != 0
    assert toy(tmp_path / "killed", "--optimizer", "muon").returncode == 0
    expected, actual = weights(tmp_path / "one"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    result = toy(tmp_path / "two", "--optimizer", "muon", ranks=2)  # a matrix may lie across both ranks
    assert result.returncode == 0, result.output
    # Orthogonalising a nearly singular gradient magnifies its rounding.
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "precision", "tolerance"), [(2, "fp32", 1e-3), (3, "fp32", 1e-3), (2, "bf16", 3e-2)]
)
def test_muon_under_the_other_zero_stages(toy, tmp_path, zero, precision, tolerance):
    assert toy(tmp_path / "one", "--optimizer", "muon", "--no-adversary").returncode == 0
    arguments = ("--optimizer", "muon", "--no-adversary", "--zero", zero, "--precision", precision)
    result = toy(tmp_path / "two", *arguments, ranks=2)
    assert result.returncode == 0, result.output
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=tolerance)


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_evaluation_sees_the_averages_and_changes_nothing(toy, tmp_path, zero):
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    options = ["--no-adversary", "--zero", zero]
    assert toy(plain, *options, ranks=2).returncode == 0
    result = toy(evaluated, *options, "--evaluate-every", 3, ranks=2)
    assert result.returncode == 0, result.output
    assert "[toy] evaluated step 6 in" in result.output
    assert curve(evaluated) == curve(plain)
    averaged = weights(evaluated)
    assert all(torch.equal(averaged[name], value) for name, value in weights(plain).items())
    rows = [json.loads(line) for line in (evaluated / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 8] and rows[0]["toy/undefined"] is None
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    model.load_state_dict(averaged)
    assert rows[-1]["toy/output"] == pytest.approx(model(torch.ones(1, 6)).sum().item(), rel=1e-5)
    events = [json.loads(line)["kind"] for line in (evaluated / "events.jsonl").read_text().splitlines()]
    assert events.count("evaluation") == 3


def test_an_evaluation_that_did_not_come_to_its_end_is_made_up_for(toy, tmp_path):
    """Its step is in the checkpoint already; the row of the one before stays."""
    run, options = tmp_path / "run", ["--evaluate-every", 3]
    assert toy(run, *options, "--fail-evaluation-at", 6).returncode != 0
    assert [json.loads(line)["step"] for line in (run / "scores.jsonl").read_text().splitlines()] == [3]
    result = toy(run, *options)
    assert result.returncode == 0, result.output
    assert "resumed at step 6/8" in result.output
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 8]
    whole = tmp_path / "whole"
    assert toy(whole, *options).returncode == 0
    undisturbed = [json.loads(line) for line in (whole / "scores.jsonl").read_text().splitlines()]
    assert [row["toy/output"] for row in rows] == [row["toy/output"] for row in undisturbed]


def test_a_discriminator_is_refused_under_zero_3(toy, tmp_path):
    result = toy(tmp_path / "run", "--zero", 3)
    assert result.returncode == 2
    assert "engine.zero_stage must be 1 or 2" in result.output


@pytest.mark.slow
def test_zero_3_gives_the_curve_of_one_rank(toy, tmp_path):
    assert toy(tmp_path / "one", "--no-adversary").returncode == 0
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):  # reasons as for the other stages
        run = tmp_path / precision
        result = toy(run, "--no-adversary", "--zero", 3, "--precision", precision, ranks=2)
        assert result.returncode == 0, result.output
        assert curve(run) == pytest.approx(curve(tmp_path / "one"), rel=tolerance)


def test_ranks_that_do_not_divide_the_streams_change_nothing(toy, tmp_path):
    """3 streams on 2 ranks: the rank with one pack less runs one at weight 0."""
    assert toy(tmp_path / "one", "--streams", 3).returncode == 0
    result = toy(tmp_path / "two", "--streams", 3, ranks=2)
    assert result.returncode == 0, result.output
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)


def test_nonfinite_step_is_not_taken_and_its_batch_is_kept(toy, tmp_path):
    run = tmp_path / "run"
    assert toy(run, "--poison-step", 4).returncode == 0
    losses = curve(run)
    assert losses[4] is None
    assert all(loss is not None for loss in losses[:4] + losses[5:])
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert len(list((run / "nonfinite").iterdir())) == 1


def test_too_many_nonfinite_steps_stop_the_run_with_one_line(toy, tmp_path):
    result = toy(tmp_path / "run", "--poison-step", 4, "--max-nonfinite", 1)
    assert result.returncode == 2
    assert result.output.count("error:") == 1
    assert "non-finite" in result.output


def test_an_alarm_is_a_line_by_default(toy, tmp_path):
    result = toy(tmp_path / "run", "--spike-step", 4)
    assert result.returncode == 0, result.output
    assert "ALARM at step 5: the loss exploded" in result.output


def test_an_alarm_stops_the_run_when_asked(toy, tmp_path):
    result = toy(tmp_path / "run", "--spike-step", 4, "--on-alarm", "stop")
    assert result.returncode == 2
    assert "stopped at step 5 by an alarm" in result.output


@pytest.mark.parametrize("trouble", ["--spike-step", "--poison-step"])
def test_roll_back_takes_other_batches_and_survives_a_kill(toy, tmp_path, trouble):
    """Back to step 3 with the data after the bad step 4: 8 steps need 10 packs of each stream."""
    arguments = (trouble, 4, "--on-alarm", "roll_back", "--max-nonfinite", 1)
    run = tmp_path / "run"
    result = toy(run, *arguments)
    assert result.returncode == 0, result.output
    assert "rolled back from step 5 to step 3" in result.output
    assert max(loss for loss in curve(run)) < 100, "the bad step's line is gone"
    assert curve(run, "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    killed = tmp_path / "killed"
    assert toy(killed, *arguments, "--kill-after", 6).returncode != 0
    again = toy(killed, *arguments)
    assert again.returncode == 0 and "rolled back" not in again.output
    assert all(torch.equal(value, weights(killed)[name]) for name, value in weights(run).items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_roll_back_under_the_other_zero_stages(toy, tmp_path, zero):
    arguments = ("--no-adversary", "--spike-step", 4, "--on-alarm", "roll_back")
    assert toy(tmp_path / "one", *arguments).returncode == 0
    result = toy(tmp_path / "two", *arguments, "--zero", zero, ranks=2)
    assert result.returncode == 0, result.output
    assert "rolled back from step 5 to step 3" in result.output
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)


def test_a_kill_in_the_middle_of_a_roll_back_leaves_a_checkpoint(toy, tmp_path):
    """Newer checkpoints go by a rename, and only after the state to go on from is written."""
    run = tmp_path / "run"
    assert toy(run, "--steps", 6).returncode == 0
    folders = sorted((run / "checkpoints").glob("step_*"))
    assert len(folders) == 2
    folders[1].rename(folders[1].with_name(f".{folders[1].name}.old"))  # what a killed removal leaves
    result = toy(run, "--steps", 8)
    assert result.returncode == 0 and "resumed at step 3/8" in result.output


def test_roll_backs_end(toy, tmp_path):
    result = toy(tmp_path / "run", "--spike-step", 4, "--on-alarm", "roll_back", "--max-roll-backs", 0)
    assert result.returncode == 2
    assert "0 roll-backs did not help" in result.output
    early = toy(tmp_path / "early", "--spike-step", 1, "--on-alarm", "roll_back")
    assert early.returncode == 2
    assert "there is no checkpoint yet" in early.output


def test_weights_are_equal_on_all_ranks_after_every_step(toy, tmp_path):
    """Compared before each save, here after each step: the discriminator's gradients reach every rank."""
    assert toy(tmp_path / "run", "--checkpoint-every", 1, ranks=2).returncode == 0


def test_a_rank_that_drifted_is_named_and_nothing_is_saved(toy, tmp_path):
    run = tmp_path / "run"
    result = toy(run, "--drift-step", 6, ranks=2)
    assert result.returncode != 0
    assert "the adversary weights of ranks [1] differ from rank 0's" in result.output + result.output
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_a_second_training_in_the_same_folder_ends_and_leaves_the_first_one_alone(start_ranks, toy, tmp_path):
    """Neither logs nor checkpoints are of both; and once the first one is killed, the same command goes on at once."""
    run, endless = tmp_path / "run", ["--steps", 100_000, "--checkpoint-every", 3]
    first = start_ranks("toy_train.py", ["--run", run, *endless], 2, tmp_path / "first.log")
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "latest").exists():
        assert first[0].is_alive() and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
        time.sleep(0.05)
    second = toy(run, *endless, ranks=2)
    lines = [line for line in second.output.splitlines() if "[toy]" in line or line.startswith("error:")]
    assert second.returncode == 2 and len(lines) == 1, second.output
    assert f"{run}: another training runs here: " in lines[0] and f"process {first[0].pid}, since" in lines[0]
    assert all(rank.is_alive() for rank in first)
    for rank in first:
        rank.kill()
        rank.join()
    steps = curve(run, "step")
    assert steps == list(range(1, len(steps) + 1))
    events = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert set(events) == {"start", "checkpoint"}
    third = toy(run, "--steps", len(steps) + 6)
    assert third.returncode == 0 and "resumed at step" in third.output
    assert "sign of life" not in third.output and "WARNING" not in third.output


def test_resume_from_other_initial_weights_is_refused(toy, tmp_path):
    run = tmp_path / "run"
    assert toy(run, "--steps", 3).returncode == 0
    result = toy(run, "--steps", 6, "--started-from", "b")
    assert result.returncode == 2
    assert "initial weights differs" in result.output


def test_two_ranks_then_one_go_on_with_the_same_global_batches(toy, reference, tmp_path):
    run = tmp_path / "run"
    assert toy(run, "--steps", 8, "--kill-after", 5, ranks=2).returncode != 0
    result = toy(run)
    assert result.returncode == 0 and "resumed at step 3/8" in result.output
    assert curve(run) == pytest.approx(curve(reference), rel=1e-5)  # the same packs, summed in another order
    states = [
        json.loads((path / "checkpoints/step_00000008/state.json").read_text()) for path in (run, reference)
    ]
    assert states[0]["data"] == states[1]["data"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_bf16_weights_keep_fp32_masters(toy, reference, tmp_path, zero):
    run = tmp_path / "run"
    result = toy(run, "--zero", zero, "--precision", "bf16", ranks=2)
    assert result.returncode == 0, result.output
    # bf16 forward and backward: 8 bits of mantissa, relative error 4e-3 a product.
    assert curve(run) == pytest.approx(curve(reference), rel=1e-2)


def test_three_ranks_go_on_in_bf16_where_two_stopped(toy, tmp_path):
    """Four packs: two for each of two ranks; on three, two ranks have one and run it again at weight zero."""
    options = ["--precision", "bf16", "--streams", 4, "--steps", 12, "--hidden", 32]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert toy(whole, *options, ranks=2).returncode == 0
    assert toy(resumed, *options, "--kill-after", 5, ranks=2).returncode != 0
    result = toy(resumed, *options, ranks=3)
    assert result.returncode == 0, result.output
    assert "resumed at step 3/12: 3 ranks" in result.output
    for name, first in (("loss", 0), ("adversary_loss", 2), ("grad_norm", 0)):
        # A product in bf16 rounds by 4e-3; packs counted twice change the norm by half.
        assert curve(resumed, name)[first:] == pytest.approx(curve(whole, name)[first:], rel=1e-2), name
    for name, expected in weights(whole).items():
        # Of nine steps of at most 1e-2 each, a hundredth: where a gradient is near zero, AdamW follows its rounding.
        assert (weights(resumed)[name] - expected).norm() < 1e-2 * 9e-2 * expected.numel() ** 0.5, name
