"""What `extract plan` prints about a job that it has measured."""

from egopatch.extract.planning.plan import Plan, format_plan


def test_plan_does_not_name_itself_as_the_command_to_run() -> None:
    advice = "copies made by `egopatch extract transcode --config CONFIG --out DIR` need about 20"
    rates = {"decoding": 20.0, "encoder": 40.0}
    plan = Plan(9, 0, {}, 0, 0, 9, 0, 1, 2, 1, None, 4, 0.05, 0.1, rates, (advice,), ())
    bound, advised = format_plan(plan).splitlines()[-2:]
    assert bound == (
        "bound      decoding, at most 20.0 clips/s per worker (the others: encoder 40); add cores, or raise "
        "engine.decoders if cores are idle"
    )
    assert advised == f"advice     {advice}"
