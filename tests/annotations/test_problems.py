from samft.annotations.problems import (
    BAD_IMAGES,
    ERROR,
    FACT,
    KINDS,
    MAX_EXAMPLES,
    NOTE,
    WARNING,
    Problems,
)


def test_every_kind_has_a_severity_and_a_meaning() -> None:
    for code, (severity, meaning) in KINDS.items():
        assert severity in (ERROR, WARNING, NOTE, FACT), code
        assert code == code.lower() and " " not in code and len(meaning) > 10
    assert all(KINDS[code][0] == ERROR for code in BAD_IMAGES)


def test_all_are_counted_and_the_first_are_shown() -> None:
    problems = Problems()
    problems.add("crowd", *range(30))
    problems.add_ids("crowd", range(5), noun="object")
    problems.add("crowd", "many", count=1000)
    assert problems["crowd"] == 1035 and problems["mask-tiny"] == 0
    assert problems.issues["crowd"].examples == [str(k) for k in range(MAX_EXAMPLES)]
    problems.add("mask-tiny")
    problems.add_ids("mask-tiny", [], noun="object")
    assert "mask-tiny" not in problems.issues


def test_the_worst_comes_first() -> None:
    problems = Problems()
    problems.add("crowd", 1)
    problems.add("mask-outside", 2, 3)
    problems.add("box-missing", 4)
    problems.add("mask-missing", 5)
    problems.add("image-empty", "a.png")
    codes = [code for code, _, _ in problems]
    assert codes == ["image-empty", "mask-missing", "mask-outside", "box-missing", "crowd"]
    assert [problems.count(s) for s in (ERROR, WARNING, NOTE, FACT)] == [1, 3, 1, 1]
    lines = problems.lines(WARNING)
    assert [line.split()[:3] for line in lines] == [
        ["warning", "mask-missing", "1"],
        ["warning", "mask-outside", "2"],
    ]
    assert lines[1].endswith("(2, 3)")
    assert problems.lines(WARNING, num_examples=1)[1].endswith("(2, ...)")


def test_json_gives_it_back() -> None:
    problems = Problems()
    problems.add("crowd", *range(30))
    problems.add("image-empty", "a.png")
    items = problems.to_json()
    assert [item["code"] for item in items] == ["image-empty", "crowd"]
    assert items[0]["severity"] == "error" and items[1]["count"] == 30
    assert Problems.from_json(items).to_json() == items
