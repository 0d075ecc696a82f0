"""Every diagnosis fires on what it names, alone, and its next command is the advised run."""

import shlex

import pytest

import baseline

DEPTH = 24


def make_log(losses, train_q=0.90, train_c=0.88, val_q=0.89, val_c=0.87):
    """Return log rows with some training losses and the last epoch's running metrics."""
    return [{"epoch": i, "train_loss": loss, "train_srocc_q": train_q, "train_srocc_c": train_c,
             "val_srocc_q": val_q, "val_srocc_c": val_c} for i, loss in enumerate(losses, 1)]


def make_summary(best=10, q=0.89, c=0.87, gap_q=0.01, gap_c=0.01, **more):
    """Return a summary whose tiers follow from its scores and gaps; healthy unless changed."""
    return {"best_epoch": best, "gap_q": gap_q, "gap_c": gap_c,
            "tier_q": baseline.tier("q", q, gap_q), "tier_c": baseline.tier("c", c, gap_c),
            "val": {"srocc_q": q, "srocc_c": c}, "saturated_q": 0.0, "saturated_c": 0.0,
            "largest_delta_q": 0.6, "largest_delta_c": 0.6, **more}


FALLING = [0.05 * 0.9 ** i for i in range(12)]


def found(argv=(), losses=FALLING, log=None, depth=DEPTH, **summary):
    """Return what training_advice finds."""
    args = baseline.parse_args(list(argv))
    return baseline.training_advice(args, make_log(losses, **(log or {})),
                                    make_summary(**summary), depth)


def names(advice):
    """Return the diagnoses."""
    return [a.what for a in advice]


# --- the diagnoses --------------------------------------------------------------------------

LOW = {"q": 0.70, "c": 0.65, "gap_q": 0.0, "gap_c": 0.0}
CASES = {
    "overfitting": {"q": 0.80, "c": 0.75, "gap_q": 0.12, "gap_c": 0.15},
    "underfitting": {**LOW, "best": 12},
    "unstable loss": {"losses": [*FALLING[:5], 0.09, *FALLING[6:]]},
    "low SROCC_C only": {"c": 0.70},
    "low SROCC_Q only": {"q": 0.70},
    "quality residual saturated": {"saturated_q": 0.2},
    "consistency residual saturated": {"saturated_c": 0.2},
    "quality residual unused": {"largest_delta_q": 0.01},
    "consistency residual unused": {"largest_delta_c": 0.01},
}
FREEZING = {"frozen": ["--freeze_clip"], "partial": ["--partial_freeze", "--freeze_layers", "18"],
            "full": []}
freezings = pytest.mark.parametrize("argv", FREEZING.values(), ids=FREEZING.keys())


@freezings
@pytest.mark.parametrize("what", CASES)
def test_a_diagnosis_fires_alone(what, argv):
    """A log that shows one trouble gets that diagnosis and no other, with evidence."""
    advice = found(argv, **CASES[what])
    assert names(advice) == [what]
    assert any(character.isdigit() for character in advice[0].evidence) and advice[0].changes


@freezings
def test_a_healthy_run_gets_no_advice(argv):
    """Good scores, small gaps, a falling loss and a residual in use need no advice."""
    assert found(argv) == []
    assert found(argv, best=4) == []
    assert found(argv, losses=[0.05]) == []
    args = baseline.parse_args([*argv, "--lr", str(baseline.LR_RANGES[baseline.freezing(
        baseline.parse_args(argv))][0])])
    assert baseline.settings_advice(args, 2400, DEPTH) == []


@pytest.mark.parametrize("gap, fires", [(0.049, False), (0.051, True), (0.3, True)])
@pytest.mark.parametrize("target", ["q", "c"])
def test_overfitting_starts_at_the_cards_gap(target, gap, fires):
    """A Train-Val Gap above 0.05 of either target is overfitting."""
    advice = found(**{f"gap_{target}": gap}, q=0.89, c=0.87)
    assert ("overfitting" in names(advice)) == fires
    if fires:
        assert f"{gap:+.3f}" in advice[0].evidence


@pytest.mark.parametrize("target", ["q", "c"])
def test_overfitting_of_one_target_is_not_a_low_score(target):
    """A high SROCC with a wide gap is overfitting only: its SROCC is not low."""
    assert names(found(**{f"gap_{target}": 0.08}, q=0.92, c=0.90)) == ["overfitting"]


def test_overfitting_shows_in_the_last_epoch_too():
    """A best epoch in the first half and a running metric far above validation is overfitting."""
    apart = {"train_q": 0.99, "val_q": 0.85}
    assert names(found(best=3, log=apart)) == ["overfitting"]
    assert found(best=7, log=apart) == []
    assert found(best=3, log={"train_q": 0.94, "val_q": 0.89}) == []


@pytest.mark.parametrize("change", [{"best": 9}, {"gap_q": 0.03}, {"q": 0.88}])
def test_underfitting_needs_all_its_signs(change):
    """Low scores that no longer rise, a gap, or one good target are not underfitting."""
    assert "underfitting" not in names(found(**{**LOW, "best": 12, **change}))


@pytest.mark.parametrize("factor, fires", [(1.1, False), (1.19, False), (1.3, True), (5, True)])
def test_unstable_loss_is_a_rise_from_one_epoch_to_the_next(factor, fires):
    """A rise of more than a fifth counts; the evidence names the worst epoch and its factor."""
    losses = [0.1, 0.05, 0.05 * factor, 0.05, 0.04]
    advice = found(losses=losses)
    assert names(advice) == (["unstable loss"] if fires else [])
    if fires:
        assert f"{factor:.1f}-fold" in advice[0].evidence and "epoch 3" in advice[0].evidence


@pytest.mark.parametrize("share, fires", [(0.04, False), (0.06, True)])
def test_saturation_starts_at_five_percent(share, fires):
    """The residual's scale is raised where more than 5 % of it sits at its bound."""
    advice = found(["--residual_scale_c", "0.3"], saturated_c=share)
    assert names(advice) == (["consistency residual saturated"] if fires else [])
    if fires:
        assert advice[0].changes == {"residual_scale_c": 0.45}
        assert "6%" in advice[0].evidence


def test_an_unused_residual_needs_training():
    """A residual that was never trained, or does not exist, is not called unused."""
    assert found(best=0, largest_delta_q=0.0, largest_delta_c=0.0) == []
    summary = make_summary()
    for name in ("saturated_q", "saturated_c", "largest_delta_q", "largest_delta_c"):
        del summary[name]
    args = baseline.parse_args(["--no_residual_learning"])
    assert baseline.training_advice(args, make_log(FALLING), summary, DEPTH) == []


def test_two_troubles_get_two_diagnoses():
    """Diagnoses do not hide each other."""
    advice = found(q=0.80, c=0.75, gap_q=0.12, gap_c=0.15, saturated_q=0.5,
                   losses=CASES["unstable loss"]["losses"])
    assert names(advice) == ["overfitting", "unstable loss", "quality residual saturated"]


# --- the directions -------------------------------------------------------------------------


def advised(what, argv=()):
    """Return (flags of the run, its changes) for one diagnosis."""
    return baseline.parse_args(list(argv)), found(argv, **CASES[what])[0].changes


@freezings
def test_overfitting_lowers_the_capacity(argv):
    """Against overfitting nothing grows but dropout, decay and what is frozen."""
    args, changes = advised("overfitting", argv)
    assert changes["dropout"] > args.dropout and changes["weight_decay"] > args.weight_decay
    assert changes["residual_scale_q"] < args.residual_scale_q
    assert changes["residual_scale_c"] < args.residual_scale_c
    if args.freeze_clip:
        assert changes["epochs"] < args.epochs and "partial_freeze" not in changes
    else:
        assert changes["lr"] < args.lr and changes["partial_freeze"]
        assert 12 < changes["freeze_layers"] < 24


@freezings
def test_underfitting_raises_the_capacity(argv):
    """Against underfitting nothing shrinks but dropout, decay and what is frozen."""
    args, changes = advised("underfitting", argv)
    assert changes["dropout"] < args.dropout and changes["weight_decay"] < args.weight_decay
    assert changes["lr"] > args.lr and changes["residual_scale_q"] > args.residual_scale_q
    assert ("freeze_layers" in changes) == args.partial_freeze
    assert changes.get("freeze_layers", 0) < 18


def test_other_directions():
    """Instability slows training; a low target gets weight; an unused residual gets speed."""
    args, changes = advised("unstable loss")
    assert changes["lr"] < args.lr and changes["warmup_ratio"] > args.warmup_ratio
    assert changes["max_grad_norm"] < args.max_grad_norm
    for low, other in (("q", "c"), ("c", "q")):
        changes = advised(f"low SROCC_{low.upper()} only")[1]
        assert changes[f"w_{low}"] > changes[f"w_{other}"]
        assert changes[f"residual_scale_{low}"] > 0.2 and f"residual_scale_{other}" not in changes
    changes = advised("quality residual unused", ["--freeze_clip", "--lr", "1e-3"])[1]
    assert changes == {"head_lr": pytest.approx(3e-3)}


@pytest.mark.parametrize("what", ["overfitting", "underfitting"])
def test_advice_about_residuals_needs_residuals(what):
    """Where both scores are predicted directly no residual is advised about."""
    changes = advised(what, ["--no_residual_learning"])[1]
    assert changes and not any("residual" in flag for flag in changes)


# --- settings -------------------------------------------------------------------------------


def settings(*argv, images=2000, depth=DEPTH):
    """Return what settings_advice finds."""
    return baseline.settings_advice(baseline.parse_args(list(argv)), images, depth)


@pytest.mark.parametrize("mode, low, high", [("frozen", 1e-3, 5e-3), ("partial", 3e-5, 1e-4),
                                             ("full", 1e-5, 3e-5)])
def test_learning_rate_outside_the_range_of_its_freezing(mode, low, high):
    """The usual range depends on what is frozen; the advice is its nearest edge."""
    for lr in (low, (low * high) ** 0.5, high):
        assert settings(*FREEZING[mode], "--lr", str(lr)) == []
    for lr, edge in ((low / 2, low), (low * 0.9, low), (high * 1.1, high), (high * 10, high)):
        advice = settings(*FREEZING[mode], "--lr", str(lr))
        assert names(advice) == ["learning rate outside the usual range"]
        assert advice[0].changes == {"lr": edge} and mode in advice[0].evidence


@pytest.mark.parametrize("images, good, bad, want", [
    (100, 0.1, 0.3, 0.1), (499, 0.05, 0.04, 0.1), (500, 0.2, 0.05, 0.2), (2999, 0.4, 0.45, 0.2),
    (3000, 0.6, 0.1, 0.3), (9999, 0.3, 0.7, 0.3), (50_000, 0.5, 0.1, 0.4)])
def test_residual_scale_by_number_of_images(images, good, bad, want):
    """A scale far from what so many images usually want is named with what they want."""
    def scaled(q, c):
        return settings("--residual_scale_q", str(q), "--residual_scale_c", str(c), images=images)
    assert scaled(good, good) == []
    for q, c in ((bad, bad), (good, bad), (bad, good)):
        advice = scaled(q, c)
        assert names(advice) == ["residual scale unusual for this many images"]
        assert advice[0].changes == {"residual_scale_q": want, "residual_scale_c": want}
        assert str(images) in advice[0].evidence
    assert settings("--residual_scale_q", str(bad), "--no_residual_learning", images=images) == []


@pytest.mark.parametrize("depth, good, bad", [(24, (12, 16, 18, 20, 22), (0, 8, 11, 23, 24)),
                                              (12, (6, 8, 9, 10, 11), (0, 2, 5, 12))])
def test_freeze_layers_unusual(depth, good, bad):
    """Few or all blocks frozen is unusual; the advice is three quarters of the tower."""
    for layers in good:
        assert settings("--partial_freeze", "--freeze_layers", str(layers), depth=depth) == []
    for layers in bad:
        advice = settings("--partial_freeze", "--freeze_layers", str(layers), depth=depth)
        assert names(advice) == ["freeze_layers unusual for this tower"]
        assert advice[0].changes == {"freeze_layers": depth * 3 // 4}
        assert f"{layers} of {depth}" in advice[0].evidence


@pytest.mark.parametrize("depth", [None, 4, 5])
def test_freeze_layers_of_a_convolutional_trunk_is_not_judged(depth):
    """The rule is about transformers, and about partial freezing."""
    assert settings("--partial_freeze", "--freeze_layers", "1", depth=depth) == []
    assert settings("--freeze_layers", "1") == []


def test_the_demo_is_outside_the_rules_of_thumb():
    """The demo's tiny CLIP and few images get no advice on settings."""
    assert settings("--demo", images=60, depth=4) == []


# --- the next command -----------------------------------------------------------------------

RUNS = {
    "defaults": [],
    "frozen": ["--freeze_clip", "--lr", "1e-3"],
    "partial": ["--partial_freeze", "--freeze_layers", "18"],
    **{f"preset {name}": ["--preset", name] for name in baseline.PRESETS},
    "demo": ["--demo"],
    "demo frozen": ["--demo", "--freeze_clip"],
    "demo with plain defaults": ["--demo", "--epochs", "20", "--lr", "3e-5", "--num_workers", "4"],
    "odd paths": ["--data_csv_path", "my data/a 'b' $c.csv", "--output_dir", "out & <x>",
                  "--cache_dir", "my cache", "--log_csv", "x y.csv"],
    "many digits": ["--lr", "1.23456789e-05", "--weight_decay", "0.012345678"],
    "switches": ["--no_pin_memory", "--no_amp", "--tensorboard", "--use_two_branch",
                 "--test_ratio", "0.15", "--label_scale_q", "100", "--resize_mode", "squash",
                 "--repeats", "3", "--use_explanations", "--w_exp", "0.2", "--grad_checkpointing"],
    "refinement": ["--use_refinement", "--refinement_layers", "2", "--refinement_heads", "4"],
}


def flags_of(args):
    """Return the flags that make a run what it is."""
    aside = {"explicit", "cache_dir", "preset", "no_amp"}
    return {key: value for key, value in vars(args).items() if key not in aside}


def parsed(command):
    """Parse a printed command as a shell and the program do."""
    words = shlex.split(command)
    assert words[:2] == ["python", "baseline.py"]
    return baseline.parse_args(words[2:])


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("run", RUNS)
def test_the_next_command_differs_in_the_advised_flags_only(run, what, capsys):
    """The printed command parses to this run's flags, the advised ones changed."""
    args = baseline.parse_args(RUNS[run])
    advice = found(RUNS[run], **CASES[what])
    capsys.readouterr()
    for one in advice:
        want = {**flags_of(args), **one.changes}
        if one.changes.get("partial_freeze"):
            want["freeze_clip"] = False
        got = flags_of(parsed(baseline.next_command(args, one)))
        assert got.keys() == want.keys()
        for flag, value in want.items():
            within = 1e-5 if flag in one.changes else 0
            same = got[flag] == value or got[flag] == pytest.approx(value, rel=within, abs=0)
            assert same, (flag, got[flag], value)
    assert advice and "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [
    ["--lr", "1"], ["--residual_scale_q", "0.9", "--residual_scale_c", "0.9"],
    ["--partial_freeze", "--freeze_layers", "2"]])
def test_a_run_as_advised_is_not_advised_again(argv):
    """Following the advice on a setting settles it."""
    args, advice = baseline.parse_args(argv), settings(*argv)
    assert len(advice) == 1
    again = parsed(baseline.next_command(args, advice[0]))
    assert baseline.settings_advice(again, 2000, DEPTH) == []


def test_a_resumed_run_is_not_resumed_again():
    """The next command starts a new run."""
    args = baseline.parse_args(["--resume_from", "outputs/baseline_last.pt", "--dropout", "0.3"])
    command = baseline.next_command(args, baseline.Advice("a", "b", {"lr": 1e-5}))
    assert "resume" not in command and parsed(command).dropout == 0.3


# --- where it is said -----------------------------------------------------------------------


def test_advice_is_printed_with_its_evidence_and_command(capsys):
    """Each finding is printed with its numbers and the next command; a healthy run says nothing."""
    args = baseline.parse_args([])
    baseline.print_advice(args, found())
    assert capsys.readouterr().out == ""
    advice = found(saturated_q=0.5, losses=CASES["unstable loss"]["losses"])
    baseline.print_advice(args, advice)
    out = capsys.readouterr().out
    for one in advice:
        assert f"{one.what}: {one.evidence}" in out and baseline.next_command(args, one) in out


def test_a_run_ends_with_its_own_advice(train, capsys):
    """What a real run prints is what its own log and summary show."""
    capsys.readouterr()
    run = train("--freeze_clip", "--lr", 3e-2, "--epochs", 6, "--dropout", 0,
                "--residual_scale_q", 0.02)
    out = capsys.readouterr().out
    rows = [{k: float(v) for k, v in row.items()} for row in baseline.read_csv(
        run.folder / "training_log.csv").to_dict("records")]
    args = baseline.parse_args(["--freeze_clip", "--lr", "3e-2", "--epochs", "6", "--dropout", "0",
                                "--residual_scale_q", "0.02"])
    want = (baseline.settings_advice(args, 28, 4)
            + baseline.training_advice(args, rows, run.summary, 4))
    said = [line for line in out.splitlines() if line.endswith("; try")]
    assert want and len(said) == len(want)
    for line, one in zip(said, want):
        assert line.startswith(f"{one.what}: ")
