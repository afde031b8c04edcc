"""The tile that is kept between calls."""

import threading

import torch

from eaftdrope.loss import buffers
from eaftdrope.loss.buffers import release_buffers, tile_buffer

LIKE = torch.empty(0)


def test_the_same_memory_serves_the_next_call():
    release_buffers()
    with tile_buffer(10, 100, LIKE) as first:
        assert first.shape == (10, 100) and first.dtype == torch.float32 and first.is_contiguous()
        address = first.data_ptr()
    with tile_buffer(20, 90, LIKE.bfloat16()) as second:
        assert second.data_ptr() == address and second.shape == (20, 90) and second.dtype == torch.bfloat16
    with tile_buffer(50, 100, LIKE) as larger:
        assert larger.shape == (50, 100)
    assert len(buffers._kept) == 1 and buffers._kept[0].numel() == 50 * 100 * 4
    release_buffers()
    assert not buffers._kept


def test_a_call_within_a_call_and_another_thread_have_their_own():
    release_buffers()
    with tile_buffer(4, 4, LIKE) as outer:
        outer.fill_(1)
        with tile_buffer(4, 4, LIKE) as inner:
            inner.fill_(2)

        def other():
            with tile_buffer(4, 4, LIKE) as third:
                third.fill_(3)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (outer == 1).all()
    assert len(buffers._kept) == 1


def test_an_error_inside_gives_the_memory_back():
    release_buffers()
    try:
        with tile_buffer(4, 4, LIKE):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert len(buffers._kept) == 1


def test_rows_on_a_device_start_at_whole_vectors():
    with tile_buffer(3, 257, torch.empty(0, device="meta")) as tile:
        assert tile.shape == (3, 257) and tile.stride() == (272, 1)
