"""A lock that is taken again and again lets others in."""

import threading

from dlp_lora.bank.turns import TurnLock


def test_who_waits_gets_the_lock_before_who_has_just_given_it_up() -> None:
    lock, begun, order = TurnLock(), threading.Event(), []

    def work() -> None:
        begun.set()
        with lock:
            order.append("waiting")

    thread = threading.Thread(target=work)
    with lock:
        with lock:  # taken twice by the same thread
            thread.start()
            begun.wait()
            while not lock.is_awaited:
                pass
        order.append("working")
    with lock:
        order.append("working again")
    thread.join()
    assert order == ["working", "waiting", "working again"]
