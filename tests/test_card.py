"""The reference card says what the program does: flags, defaults, ranges, presets, advice.

A new flag fails these tests until it stands in the card's table of its group, in the parser's
order.
"""

import argparse
import re
import shlex
from pathlib import Path

import pytest

import baseline

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "PARAMETER_QUICK_REFERENCE.md"
GUIDE = ROOT / "docs" / "HYPERPARAMETER_TUNING_GUIDE.md"
PAGES = [page for page in (CARD, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
         if page.exists()]
NOT_SET = "—"

EFFECTS = {"--lr": "±0.05", "--freeze_layers": "±0.03", "--residual_scale_c": "±0.02",
           "--w_c": "±0.01", "--residual_scale_q": "±0.01"}
RANGES = {"--lr": ["1e-6..1e-3"], "--freeze_layers": ["16..22", "8"],
          "--residual_scale_q": ["0.1..0.5"], "--residual_scale_c": ["0.1..0.5"],
          "--w_q": ["0.3..0.7"], "--w_c": ["0.3..0.7"], "--w_exp": ["0.05..0.3"],
          "--epochs": ["10..50"], "--batch_size": ["8..128"], "--weight_decay": ["1e-5..1e-3"],
          "--warmup_ratio": ["0.01..0.1"], "--max_grad_norm": ["0.5..2"],
          "--dropout": ["0..0.3"]}
PURPOSES = {"A": "quick baseline", "B": "recommended", "C": "small data", "D": "large data",
            "E": "against overfitting", "F": "best result (long training)"}


def scales(value):
    """Return both residual scales at one value."""
    return dict(residual_scale_q=value, residual_scale_c=value)


DIAGNOSES = {
    "Overfitting": [dict(freeze_layers=20), scales(0.15), dict(dropout=0.2), dict(lr=1e-5)],
    "Underfitting": [dict(freeze_layers=16), scales(0.3), dict(lr=5e-5), dict(dropout=0.05)],
    "Unstable loss": [dict(warmup_ratio=0.1), dict(max_grad_norm=0.5), dict(lr=1e-5),
                      dict(batch_size=16)],
    "Low SROCC_C only": [dict(w_q=0.3, w_c=0.7), dict(residual_scale_c=0.3),
                         dict(freeze_layers=16)],
    "Low SROCC_Q only": [dict(w_q=0.7, w_c=0.3), dict(residual_scale_q=0.3)],
}
FLOW = {  # by hand: what --tune tries from preset B on 24 blocks
    "Baseline": [{}],
    "Learning rate": [dict(lr=1e-5), dict(lr=5e-5)],
    "Frozen blocks": [dict(freeze_layers=16), dict(freeze_layers=20)],
    "Residual scales": [scales(0.15), scales(0.25)],
    "Remedies": [dict(freeze_layers=20, **scales(0.15), dropout=0.2, lr=1e-5)],
}
TUNE = ["--preset", "B", "--tune"]
RULES = {
    "Learning rate by freezing": [["frozen", "1e-3..5e-3"], ["partial", "3e-5..1e-4"],
                                  ["full", "1e-5..3e-5"]],
    "Residual scale by amount of data": [["<500", "0.1"], ["500-3K", "0.2"], ["3K-10K", "0.3"],
                                         [">10K", "0.4..0.5"]],
    "Regularisation by overfitting": [["none", "0"], ["light", "0.1"], ["heavy", "0.2"]],
}


# --- reading markdown -----------------------------------------------------------------------


def sections(text, level):
    """Return {English title: body} of the headings of one level, in order."""
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.M)[1:]
    titles = [title.rsplit(" / ", 1)[-1].strip() for title in parts[::2]]
    assert len(set(titles)) == len(titles), f"a title stands twice: {titles}"
    return dict(zip(titles, parts[1::2], strict=True))


def chapter(name):
    """Return the body of a chapter of the card."""
    return sections(CARD.read_text(encoding="utf-8"), 2)[name]


def table(text):
    """Return the rows of the one table in text, its head first, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 2 and re.fullmatch(r"[| -]+", lines[1]), f"no table in:\n{text}"
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}, f"a ragged table:\n{text}"
    return rows[:1] + rows[2:]


def body(text):
    """Return the rows of a table without its head."""
    return table(text)[1:]


def quoted(cell):
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def english(cell):
    """Return the English half of a bilingual cell."""
    return cell.split(" / ", 1)[1]


def commands(text):
    """Return the argument list of every `python baseline.py ..` in fences and inline code."""
    fences = re.findall(r"^ *```.*?\n(.*?)^ *```", text, flags=re.M | re.S)
    inline = quoted(re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    found = []
    for line in "\n".join(fences).replace("\\\n", " ").splitlines() + inline:
        match = re.search(r"(?:^|[\s;&])python3? baseline\.py(?=\s|$)(.*)", line)
        if match and not line.lstrip().startswith("#"):
            found.append(arguments(match.group(1)))
    return found


def arguments(text):
    """Split a shell command's arguments; stop at a comment, pipe, redirection or next command."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    end = next((i for i, word in enumerate(words) if set(word) <= set("();<>|&")), len(words))
    return words[:end]


def parse(argv):
    """Return the program's own reading of a command, as a dict; None where it is --help."""
    try:
        return vars(baseline.parse_args(argv))
    except SystemExit as stop:
        assert stop.code == 0, f"the program refuses: python baseline.py {shlex.join(argv)}"
        return None


def given(argv):
    """Return {flag: value} of the flags that a command names."""
    values = parse(argv)
    return {word[2:]: values[word[2:]] for word in argv if word.startswith("--")}


# --- reading the parser ---------------------------------------------------------------------


def groups():
    """Return {group title: actions}, in the parser's order, without the empty groups."""
    found = {g.title: g._group_actions for g in baseline.build_parser()._action_groups}
    return {title: actions for title, actions in found.items() if actions}


def accepts(action, text):
    """Return whether the flag takes this text as its value."""
    try:
        action.type(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return True


def is_numeric(action):
    """Return whether the flag takes a number and refuses a word."""
    return action.type is not None and not accepts(action, "word")


def flag_tables():
    """Return {group title: text} of the card's flag tables."""
    return sections(chapter("Every flag"), 3)


ROWS = {quoted(row[0])[0]: row for text in flag_tables().values() for row in body(text)}
each_flag = pytest.mark.parametrize("action", [
    pytest.param(action, id=action.option_strings[-1])
    for actions in groups().values() for action in actions])


# --- every flag -----------------------------------------------------------------------------


def test_groups_and_flags_stand_in_the_parsers_order():
    """The card has the parser's groups and flags, in its order, in tables of one layout."""
    card = {title: [quoted(row[0]) for row in body(text)] for title, text in flag_tables().items()}
    parser = {title: [action.option_strings for action in actions]
              for title, actions in groups().items()}
    assert list(card) == list(parser)
    assert card == parser
    for text in flag_tables().values():
        head = [english(cell) for cell in table(text)[0]]
        assert head == ["flag", "default", "range", "meaning"]


def test_no_page_of_ours_names_an_unknown_flag():
    """Card and guide name no flag that the program has not."""
    known = {name for actions in groups().values() for action in actions
             for name in action.option_strings}
    for page in (CARD, GUIDE):
        used = set(re.findall(r"(?<![\w-])--[A-Za-z]\w*", page.read_text(encoding="utf-8")))
        assert used and used <= known, f"{page.name}: {sorted(used - known)}"


@each_flag
def test_default_is_the_parsers(action):
    """The default on the card is the parser's."""
    cell = ROWS[action.option_strings[0]][1]
    if action.nargs == 0:
        expected = "on" if action.const is not None and action.default == action.const else "off"
        assert cell == f"`{expected}`"
    elif action.default is None:
        assert cell == NOT_SET
    else:
        assert re.fullmatch("`[^`]+`", cell), f"a default stands alone in backticks, not {cell!r}"
        number = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
        stated = float(quoted(cell)[0]) if number else quoted(cell)[0]
        assert stated == (action.default if number else str(action.default))


def contains(spec, value):
    """Return whether a range (`a..b`, `>= a`, `> a`, `<= a`, `a`) holds a value."""
    if ".." in spec:
        low, high = map(float, spec.split(".."))
        assert low < high
        return low <= value <= high
    sign, limit = re.fullmatch(r"(>=|<=|>|)\s*(\S+)", spec).groups()
    limit = float(limit)
    return {">=": value >= limit, "<=": value <= limit, ">": value > limit,
            "": value == limit}[sign]


def check_limit(action, spec):
    """Fail unless the program accepts what a range holds, and no more than a limit says."""
    if ".." in spec:
        assert all(accepts(action, end) for end in spec.split("..")), spec
        return
    sign, limit = re.fullmatch(r"(>=|<=|>|)\s*(\S+)", spec).groups()
    assert accepts(action, limit) == (sign != ">"), spec
    beyond = {">=": float(limit) - 1, "<=": float(limit) * 1.01}.get(sign)
    assert beyond is None or not accepts(action, f"{beyond:g}"), spec


@each_flag
def test_range_is_what_the_program_accepts_and_holds_the_default(action):
    """The range on the card is accepted, its limits are the parser's, the default is inside."""
    cell = ROWS[action.option_strings[0]][2]
    if action.nargs == 0:
        assert cell == NOT_SET
    elif action.choices:
        assert quoted(cell) == [str(choice) for choice in action.choices]
    elif is_numeric(action):
        specs = quoted(cell)
        words = [spec for spec in specs if re.fullmatch("[a-z]+", spec)]
        numbers = [spec for spec in specs if spec not in words]
        assert numbers, f"a numeric flag needs a range such as `0.1..0.5` or `>= 1`, not {cell!r}"
        for spec in numbers:
            check_limit(action, spec)
        assert all(accepts(action, word) for word in words)
        if isinstance(action.default, str):
            assert action.default in words
        elif action.default is not None:
            limits = [spec for spec in numbers if spec[0] in "<>"]
            ranges = [spec for spec in numbers if spec not in limits]
            assert all(contains(spec, action.default) for spec in limits)
            assert not ranges or any(contains(spec, action.default) for spec in ranges)
    else:
        assert " / " in cell, f"say in both languages what the value is, not {cell!r}"


@each_flag
def test_meaning_is_in_both_languages(action):
    """Each meaning is Chinese, then English."""
    chinese, _, english_half = ROWS[action.option_strings[0]][3].partition(" / ")
    assert re.search("[\u4e00-\u9fff]", chinese)
    assert re.search("[A-Za-z]", english_half)
    assert not re.search("[\u4e00-\u9fff]", english_half)


def test_recommended_ranges():
    """The card recommends these ranges and no others."""
    assert {flag for flag, row in ROWS.items() if ".." in row[2]} == set(RANGES)
    assert {flag: quoted(ROWS[flag][2]) for flag in RANGES} == RANGES


# --- presets, diagnoses, flow ---------------------------------------------------------------


def test_every_preset_is_on_the_card_with_its_purpose():
    """Each preset has a heading that says what it is for."""
    titles = [line for line in chapter("Presets").splitlines() if line.startswith("### ")]
    assert {title.split()[1]: english(title) for title in titles} == PURPOSES
    assert list(PURPOSES) == sorted(baseline.PRESETS)


@pytest.mark.parametrize("preset", sorted(baseline.PRESETS))
def test_full_command_equals_the_preset(preset):
    """The two commands of a preset give the same run."""
    parts = re.split(r"^### (\w) .*$", chapter("Presets"), flags=re.M)[1:]
    short, full = commands(dict(zip(parts[::2], parts[1::2], strict=True))[preset])
    assert short == ["--preset", preset]
    assert given(full) == baseline.PRESETS[preset]
    expected, stated = ({name: value for name, value in parse(argv).items()
                         if name not in ("preset", "command")} for argv in (short, full))
    assert stated == expected


def test_presets_stay_inside_the_recommended_ranges():
    """No preset leaves a range that the card recommends."""
    checked = [any(contains(spec, value) for spec in RANGES[f"--{flag}"])
               for values in baseline.PRESETS.values() for flag, value in values.items()
               if f"--{flag}" in RANGES]
    assert len(checked) > 30 and all(checked)


def test_the_five_parameters_that_matter_most():
    """The five flags have their effects, which are called rules of thumb."""
    text = chapter("The five that matter most")
    assert [(quoted(row[0]), row[1]) for row in body(text)] == [
        ([flag], effect) for flag, effect in EFFECTS.items()]
    text = " ".join(text.split())
    assert "rules of thumb" in text and "this repository has not measured them" in text


def test_diagnoses():
    """Each diagnosis has its remedies, in order."""
    found = {title: [given(shlex.split(quoted(row[0])[0])) for row in body(text)]
             for title, text in sections(chapter("Diagnosis"), 3).items()}
    assert found == DIAGNOSES


def test_flow():
    """The chapter begins with --tune; each of its five stages has the commands by hand."""
    text = chapter("Tuning in five stages")
    assert commands(text)[0] == TUNE
    found = {title: [given(argv) for argv in commands(stage)]
             for title, stage in sections(text, 3).items()}
    assert found == {stage: [dict(preset="B", **flags) for flags in tried]
                     for stage, tried in FLOW.items()}


def test_flow_is_the_programs(tmp_path):
    """By hand the stages try what --tune tries: an overfitting preset B on 24 blocks."""
    args = baseline.parse_args(["--preset", "B"])
    row = {"output_dir": str(tmp_path), "blocks": 24, "best_epoch": 9,
           "saturated_q": 0.0, "saturated_c": 0.0, "largest_delta_q": 0.5, "largest_delta_c": 0.5}
    for target in baseline.TARGETS:
        row |= {f"gap_{target}": 0.1, f"val_srocc_{target}": 0.9, f"tier_{target}": "needs work"}
    log = ["epoch,train_loss,train_srocc_q,val_srocc_q,train_srocc_c,val_srocc_c",
           *(f"{epoch},0.1,1,0.9,1,0.9" for epoch in range(1, 21))]
    (tmp_path / args.log_csv).write_text("\n".join(log), encoding="utf-8")
    best = baseline.Candidate("baseline", "", args, [row])
    tried = [[given(shlex.split(flags)) for flags in baseline.stage_flags(stage, best, None)]
             for stage in baseline.STAGES]
    assert tried == list(FLOW.values())[1:]


def test_guide_is_around_the_flow():
    """The guide leads to --tune, by the card's command, and says what it leaves."""
    text = sections(GUIDE.read_text(encoding="utf-8"), 2)["Tune"]
    assert commands(text)[0] == TUNE
    assert all(name in text for name in (
        "tuning.csv", "tuning.png", "outputs/tuning", "baseline_best.pt", "result.json"))


def test_weight_decay_is_no_remedy():
    """No remedy, stage or rule counts on weight decay; its row has the arithmetic."""
    for name in ("Diagnosis", "Tuning in five stages", "Rules of thumb"):
        assert "weight_decay" not in chapter(name)
    assert "lr * this" in ROWS["--weight_decay"][3]


def test_guide_explains_every_column_of_the_log():
    """The guide's table has the log's columns, in the log's order."""
    rows = body(sections(GUIDE.read_text(encoding="utf-8"), 2)["Read a run"])
    assert [name for row in rows for name in quoted(row[0])] == list(baseline.LOG_COLUMNS)


def test_rules_of_thumb():
    """The three tables of rules hold these values."""
    found = {title: [[cell.rsplit(" / ", 1)[-1].split(" (")[0] if i == 0 else quoted(cell)[0]
                      for i, cell in enumerate(row)] for row in body(text)]
             for title, text in sections(chapter("Rules of thumb"), 3).items()}
    assert found == RULES


# --- tiers, commands, links -----------------------------------------------------------------


TIERS = [["excellent", ">0.90", ">0.88", "<0.02"], ["good", "0.87-0.90", "0.85-0.88", "0.02-0.03"],
         ["fair", "0.85-0.87", "0.82-0.85", "0.03-0.05"], ["needs work", "<0.85", "<0.82", ">0.05"]]


def test_tiers_are_the_programs():
    """Card and guide have the same table of tiers, which is the program's."""
    for page, title in ((CARD, "Target tiers"), (GUIDE, "Tiers")):
        rows = body(sections(page.read_text(encoding="utf-8"), 2)[title])
        assert [[row[0].rsplit(" / ", 1)[-1], *row[1:]] for row in rows] == TIERS
    for column, target in ((1, "q"), (2, "c")):
        lower = [float(re.findall(r"\d\.\d+", row[column])[0]) for row in TIERS[:3]]
        gaps = [float(re.findall(r"\d\.\d+", row[3])[-1]) for row in TIERS[:3]]
        titles = [row[0] for row in TIERS[:3]]
        assert baseline.TIERS[target] == tuple(zip(titles, lower, gaps))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted_and_links_lead_somewhere(page):
    """The program accepts each command of a page, and each file that it links to exists."""
    text = page.read_text(encoding="utf-8")
    for argv in commands(text):
        parse(argv)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_commands_are_found_however_they_are_written():
    """This file's reader finds commands in fences and inline, over two lines, before comments."""
    text = ("```bash\n# python baseline.py --no_such\npython baseline.py --lr 1e-4 \\\n"
            "    --epochs 3  # why\nX=1 python baseline.py --demo | tee log\n```\n"
            "Inline `python baseline.py --preset A` and `baseline.py`.\n")
    assert commands(text) == [["--lr", "1e-4", "--epochs", "3"], ["--demo"], ["--preset", "A"]]


def test_card_shows_the_demo_and_points_to_both_guides():
    """Who starts at the card finds the demo, and what to read next."""
    text = CARD.read_text(encoding="utf-8")
    assert ["--demo"] in commands(text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"docs/HYPERPARAMETER_TUNING_GUIDE.md", "docs/RESIDUAL_LEARNING_USAGE.md"} <= set(links)
