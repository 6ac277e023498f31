from unified_rl.reward.skips import Skipped, SkipReason, count_skips


def test_reasons_are_counted_and_all_are_listed():
    outcomes = [
        0.5,
        Skipped(SkipReason.TOO_EASY),
        None,
        Skipped(SkipReason.CUT_OFF, "here"),
        Skipped(SkipReason.TOO_EASY),
    ]
    counts = count_skips(outcomes)
    assert counts.pop("too_easy") == 2 and counts.pop("cut_off") == 1
    assert set(counts.values()) == {0} and len(counts) == len(SkipReason) - 2


def test_text_for_a_record():
    assert Skipped(SkipReason.CUT_OFF, "here").text == "cut_off: here"
    assert Skipped(SkipReason.CUT_OFF).text == "cut_off"
