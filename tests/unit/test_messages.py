"""What is packed is what is unpacked."""

from __future__ import annotations

import dataclasses

import numpy as np
import orjson
import pytest
from builders import admit, make_register, make_rows, make_spec, make_step

from moescope_service.messages import (
    CaptureSpec,
    Register,
    pack,
    pack_all,
    pack_steps,
    unpack,
    unpack_steps,
)


def wire(frames):
    return [memoryview(bytes(memoryview(frame))) for frame in frames]


def test_a_step_survives_the_wire():
    step = make_step(
        7,
        [(0, 0, 3), (5, 9, 1)],
        finished=[2],
        finished_unseen=["gone"],
        admitted=[admit(0, "a", 3, [1, 2])],
        resumed=[admit(5, "b", 0, [3], cached=4)],
        grown=[(6, [8, 9])],
        block_copies=[(1, 2)],
    )
    frames = wire(pack_steps([step]))
    kind, values = unpack(frames)
    assert kind == "steps"
    (back,) = unpack_steps(values, frames, make_spec())
    for field in dataclasses.fields(step):
        got, sent = getattr(back, field.name), getattr(step, field.name)
        if isinstance(sent, np.ndarray):
            assert got.dtype == sent.dtype
            np.testing.assert_array_equal(got, sent)
        else:
            assert (
                [*map(tuple, got)] == sent
                if field.name in {"grown", "block_copies"}
                else got == sent
            )


@pytest.mark.parametrize("lost", ["queue_full", "paused", "hook_missed"])
def test_a_lost_step_has_spans_and_a_reason_but_no_rows(lost):
    step = make_step(0, [(0, 0, 3)], lost=lost)
    frames = wire(pack_steps([step]))
    assert len(frames) == 2
    (back,) = unpack_steps(unpack(frames)[1], frames, make_spec())
    assert (back.lost, back.topk_ids, back.topk_weights) == (lost, None, None)
    assert back.spans.tolist() == [[0, 0, 3]]
    assert back.rows_bytes == 0


def test_a_step_without_rows_has_no_spans():
    frames = wire([bytes(memoryview(f)) if len(f) else b"" for f in pack_steps([make_step(3)])])
    (back,) = unpack_steps(unpack(frames)[1], frames, make_spec())
    assert back.spans.shape == (0, 3)
    assert back.topk_ids is None


def test_sixteen_bit_ids_and_float32_weights():
    spec = make_spec(num_experts=512, id_dtype="uint16", weights_dtype="float32")
    rows = make_rows(400, 3, spec)
    frames = wire(pack_steps([make_step(0, [(0, 400, 3)], rows=rows)]))
    (back,) = unpack_steps(unpack(frames)[1], frames, spec)
    np.testing.assert_array_equal(back.topk_ids, rows[0])
    np.testing.assert_array_equal(back.topk_weights, rows[1])
    assert back.rows_bytes == 3 * 2 * 2 * (2 + 4)


def test_introduction_and_register_survive():
    for kind, message, of in (
        ("spec", make_spec(seed=None), CaptureSpec),
        ("register", make_register("r/1 ü", lora="adapter"), Register),
    ):
        got, values = unpack(pack(kind, **dataclasses.asdict(message)))
        assert (got, of(**values)) == (kind, message)


def test_arrays_follow_the_control_frame():
    frames = pack("finish", [b"xyz"], reason="stop")
    assert frames[1] == b"xyz"
    assert unpack(frames) == ("finish", {"reason": "stop"})


@pytest.mark.parametrize("frame", [b"", b"\x80", b"{}", b"not json"])
def test_a_frame_that_is_no_control_frame_is_an_error(frame):
    with pytest.raises((ValueError, KeyError)):
        unpack([frame])


def test_control_is_plain_json():
    control = orjson.loads(pack_steps([make_step(1, [(0, 0, 1)])])[0])
    assert control["kind"] == "steps"
    (step,) = control["steps"]
    assert not {"spans", "topk_ids", "topk_weights"} & step.keys()


def test_steps_in_one_message_stay_apart():
    steps = [
        make_step(3, [(0, 0, 3), (1, 5, 2)], admitted=[admit(0, "a", 3, [1])]),
        make_step(4, finished=[1]),
        make_step(5, [(0, 3, 1)], lost="queue_full"),
        make_step(6, [(0, 4, 1)]),
    ]
    frames = wire(pack_steps(steps))
    back = unpack_steps(unpack(frames)[1], frames, make_spec())
    assert [step.number for step in back] == [3, 4, 5, 6]
    for got, sent in zip(back, steps, strict=True):
        assert (got.finished, got.admitted, got.lost) == (sent.finished, sent.admitted, sent.lost)
        np.testing.assert_array_equal(got.spans, sent.spans)
        for name in ("topk_ids", "topk_weights"):
            want = getattr(sent, name)
            assert (getattr(got, name) is None) == (want is None)
            if want is not None:
                np.testing.assert_array_equal(getattr(got, name), want)


def test_a_message_of_steps_without_rows_has_no_frames_for_them():
    frames = wire(
        pack_steps([make_step(0, finished=[1]), make_step(1, [(0, 0, 1)], lost="paused")])
    )
    assert len(frames) == 2


def rows_of(spans):
    return [(handle, start + row) for handle, start, count in spans for row in range(count)]


@pytest.mark.parametrize("rows_a_piece", [1, 3, 5, 100])
def test_a_large_step_is_cut(rows_a_piece):
    spans = [(0, 7, 4), (2, 0, 1), (1, 30, 6), (3, 2, 0)]
    step = make_step(9, spans, finished=[5], admitted=[admit(2, "b", 1, [4])])
    messages = [wire(one) for one in pack_all([step], rows_a_piece * step.rows_bytes // 11)]
    back = [one for frames in messages
            for one in unpack_steps(unpack(frames)[1], frames, make_spec())]  # fmt: skip
    assert [one.part for one in back] == list(range(-(-11 // rows_a_piece)))
    assert [one.has_more for one in back] == [True] * (len(back) - 1) + [False]
    assert {one.number for one in back} == {9}
    assert (back[0].finished, back[0].admitted) == (step.finished, step.admitted)
    assert not any(one.finished or one.admitted or one.hook_s for one in back[1:])
    assert all(len(one.topk_ids) == one.spans[:, 2].sum() <= rows_a_piece for one in back)
    for name in ("topk_ids", "topk_weights"):
        got = np.concatenate([getattr(one, name) for one in back])
        np.testing.assert_array_equal(got, getattr(step, name))
    assert [row for one in back for row in rows_of(one.spans.tolist())] == rows_of(spans)


def test_what_fits_and_what_was_joined_is_one_message():
    steps = [make_step(number, [(0, number, 1)]) for number in range(4)]
    assert len(pack_all(steps, max_bytes=1)) == 1
    assert len(pack_all([make_step(0, [(0, 0, 90)], lost="paused")], max_bytes=1)) == 1
    assert len(pack_all([make_step(0, finished=[1])], max_bytes=1)) == 1
