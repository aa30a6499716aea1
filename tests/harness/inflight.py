"""Requests in flight on a libnbd handle."""


def drain(handle, below=0):
    """Waits until at most `below` are; the others' errors are raised."""
    while handle.aio_in_flight() > below:
        handle.poll(-1)
        while handle.aio_in_flight():
            cookie = handle.aio_peek_command_completed()
            if not cookie:
                break
            handle.aio_command_completed(cookie)
