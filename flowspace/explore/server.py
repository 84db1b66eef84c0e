"""The local server of the page: this machine only, on a port that is free."""

import contextlib
import ipaddress
import os
import socket
import threading

from flowspace.errors import InputError

__all__ = ["DEFAULT_PORT", "free_port", "local_host", "serve"]

DEFAULT_PORT = 8080


def serve(host: str = "127.0.0.1", port: int | None = None, open_browser: bool = True) -> None:
    """Serve the page until it is interrupted.

    Args:
        host: a loopback address: the page has no password.
        port: where; without it `DEFAULT_PORT`, or any free one if that is taken.
        open_browser: whether to open a window of the browser.

    Raises:
        InputError: if the host is another machine's to reach, or the port is taken.
        ModuleNotFoundError: if NiceGUI or latex2mathml is missing (the extra ``explore``).
    """
    host, port = local_host(host), free_port(host, port)
    import nicegui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from flowspace.explore import page, workers

    shown = host
    if ":" in host:
        shown = f"[{host}]"
    threading.Thread(target=workers.warm_up, daemon=True).start()
    page.add_page()
    nicegui.app.add_middleware(
        TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host]
    )
    print(f"The page is at http://{shown}:{port}; Ctrl+C ends it.", flush=True)
    nicegui.ui.run(
        host=host,
        port=port,
        title="flowspace explore",
        show=open_browser,
        reload=False,
        show_welcome_message=False,
        dark=None,
    )


def local_host(host: str) -> str:
    """Return a loopback address as it was given.

    Raises:
        InputError: if it is none.
    """
    is_local = host == "localhost"
    with contextlib.suppress(ValueError):
        is_local = is_local or ipaddress.ip_address(host).is_loopback
    if not is_local:
        raise InputError(
            f"got host {host}; the page has no password, so it is for this machine alone: write "
            "127.0.0.1, or leave it out"
        )
    return host


def free_port(host: str, port: int | None) -> int:
    """Return the port that is asked for; without one `DEFAULT_PORT`, or any that is free.

    Raises:
        InputError: if the port that is asked for is taken, or is none.
    """
    if port is not None:
        if not 0 < port < 2**16:
            raise InputError(f"got port {port}; write a number from 1 to 65535")
        if not _is_free(host, port):
            raise InputError(f"got port {port}, which is taken; leave it out for a free one")
        return port
    if _is_free(host, DEFAULT_PORT):
        return DEFAULT_PORT
    with _socket(host) as any_port:
        any_port.bind((host, 0))
        return any_port.getsockname()[1]


def _is_free(host: str, port: int) -> bool:
    with _socket(host) as trial:
        try:
            trial.bind((host, port))
        except OSError:
            return False
    return True


def _socket(host: str) -> socket.socket:
    family = socket.AF_INET
    if ":" in host:
        family = socket.AF_INET6
    made = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # a server that has just ended leaves its port free
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made
