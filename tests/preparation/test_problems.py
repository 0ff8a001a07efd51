"""The report of what is wrong."""

from cluda_cli.preparation.problems import BadFile, Kind, Problem, describe_ids, format_report


def test_errors_come_first_and_examples_are_few() -> None:
    problems = [Problem(Kind.NO_IMAGE, f"{i}.png") for i in range(5)] + [Problem(Kind.SIZE, "x.png", "1 x 2")]
    assert format_report(problems) == [
        "error: labels of another size than their image: 1; image and label must have the same height and width",
        "  x.png: 1 x 2",
        "warning: labels without an image: 5",
        "  0.png", "  1.png", "  2.png",
        "  and 2 more",
    ]  # fmt: skip


def test_ids_are_added_up_over_files() -> None:
    problems = [Problem(Kind.IDS, "a.png", "", {"40": 1, "7": 5}), Problem(Kind.IDS, "b.png", "", {"40": 9})]
    assert format_report(problems)[0].startswith(
        "error: labels with ids outside the class table: 2 (40 in 10 pixels, 7 in 5 pixels); "
    )


def test_many_ids_are_shortened() -> None:
    text = describe_ids({str(i): 100 - i for i in range(15)} | {"rare": 1})
    assert text == "0 in 100 pixels, 1 in 99 pixels, 2 in 98 pixels, 3 in 97 pixels and 12 more ids"
    assert describe_ids({"rare": 1}) == "rare in 1 pixel"


def test_a_bad_file_becomes_a_problem() -> None:
    problem = BadFile(Kind.IDS, "9 in 2 pixels", {"9": 2}).to_problem("l/a.png")
    assert problem == Problem(Kind.IDS, "l/a.png", "9 in 2 pixels", {"9": 2})


def test_a_problem_of_a_whole_split_leaves_out_no_file() -> None:
    of_splits = {kind for kind in Kind if kind.text.startswith("splits")}
    assert Kind.EMPTY in of_splits and Kind.BLANK in of_splits
    assert not [kind for kind in of_splits if kind.leaves_out]
    assert Kind.UNREADABLE.leaves_out


def test_every_kind_is_reported_in_its_own_words() -> None:
    assert len({kind.text for kind in Kind}) == len(Kind)
