#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The msmtpd.py authors. The full text of the licence is in the file LICENSE.
"""A small SMTP server that hands each mail to a command or to a function.

As a program it listens on a local port, or serves one client under inetd, and pipes every mail
to a command such as ``msmtp -f %F --``: see ``msmtpd.py --help`` and msmtpd(1). As a module it
is the SMTP server that Python's standard library no longer has:

    import smtplib, msmtpd
    mails = []
    with msmtpd.Server(deliver=mails.append) as server:
        smtplib.SMTP(server.host, server.port).sendmail("a@example.org", ["b@example.org"], "Hi")
    print(mails[0].sender, mails[0].recipients, mails[0].data)

The protocol is RFC 5321 with PIPELINING (RFC 2920), SIZE (1870), 8BITMIME (6152), SMTPUTF8
(6531), ENHANCEDSTATUSCODES (2034, 3463), STARTTLS (3207) and AUTH PLAIN and LOGIN (4954).

Moving here from aiosmtpd (left); what is async there is a plain function here:

    Controller(handler, hostname=h, port=p)   Server(deliver, host=h, port=p); 0 is a free port
    handle_DATA(server, session, envelope)    deliver(mail)
    envelope.mail_from, .rcpt_tos, .content   mail.sender, .recipients, .data (lines end in LF)
    envelope.mail_options, .rcpt_options      mail.mail_options, .rcpt_options
    session.peer, .host_name, .auth_data      mail.peer, .helo, .user
    return "250 text"                         the same, or return nothing
    return "550 5.1.1 text"                   raise PermanentFailure("5.1.1 text", 550)
    return "451 text"                         raise TemporaryFailure("text", 451)
    handle_MAIL, handle_RCPT                  Server(check=function(address, mail))
    other handle_... and smtp_... methods     do_... methods of a subclass of Session
    authenticator, auth_required=False        authenticate=function(user, password) -> bool,
    (the default), tls_context                auth_required=False (it is True here), tls
    await handle(mail) in a loop              asyncio.run_coroutine_threadsafe(handle(mail),
                                              loop).result() in deliver; stop the server by
                                              await loop.run_in_executor(None, server.stop)

From the removed module smtpd: keep the class, without its base, and give its method to Server:
Server(smtpd_handler(Mine().process_message), port=8025).serve_forever().

What help() tells of is stable. The first number of __version__ changes with what code that uses
the module could notice, the second where something is added.

The rooms, from top to bottom: limits; values (replies, failures, mails); log; grammar; mail data;
wire (the client's connection); session (a method for each verb); authentication; delivery (the
command); serving (listeners and threads); command line.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]     # this file's folder, ~/bin maybe, where a queue.py may be the user's own

import collections
import contextlib
import errno
import functools
import io
import itertools
import os
import re
import select
import signal
import threading
import time

TYPE_CHECKING = False  # as typing's own, whose import would cost inetd users some milliseconds
if TYPE_CHECKING:
    import argparse
    import email.message
    import logging
    import socket
    import ssl
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, BinaryIO, NoReturn, TypeVar, Union

    T = TypeVar("T")
    Deliver = Callable[["Mail"], Union[str, None]]      # not object: that would hide an async one
    Check = Callable[[str, "Mail"], None]
    Authenticate = Callable[[str, str], bool]
    Logger = Union[logging.Logger, logging.LoggerAdapter[Any]]
    Connection = Union[socket.socket, "_Descriptors"]
    Ask = Callable[[bytes], bytes]
    Wait = tuple[float, float, int]     # deadline, since, kind: see the room "Wire"

__version__ = "2.0"
__all__ = ["Server", "Session", "Mail", "Peer", "Reply", "Command", "TemporaryFailure",
           "PermanentFailure", "one_user", "smtpd_handler", "main"]    # and the limits

# ---- Limits. Who embeds or tests the server may set them; they are read when they are needed. -

MAX_SIZE = 64 * 1024 * 1024        # bytes of mail data as received; at least 64 K: 4.5.3.1.7
MAX_MEMORY = 128 * 1024            # bytes of mail data kept in memory; if larger, it goes to a file
MAX_SESSIONS = 16                  # served at a time, further clients wait in the listen queue
MAX_RECIPIENTS = 1000              # of one mail; at least 100: RFC 5321 4.5.3.1.8
MAX_RECIPIENT_BYTES = 256 * 1024   # of all as arguments, each with its end and pointer: 9 bytes
MAX_HOPS = 5                       # times that a mail may come here: RFC 5321 6.3
MAX_LINE = 2048                    # bytes, end included; at least 512 plus extensions: 4.5.3.1.4
MAX_AUTH_LINE = 12288              # bytes of a line in an AUTH exchange: RFC 4954 section 4
MAX_ERRORS = 10                    # protocol errors since the last mail, the last answered by 421
MAX_ERROR_OUTPUT = 4096            # bytes kept of what a command writes to standard error
MAX_ERROR_TEXT = 300               # bytes of it that a reply repeats
MAX_LOGGED = 200                   # characters of a value from outside that a log line repeats
MAX_UNENDED = 16                   # mails are deferred once so many commands cannot be ended
TIMEOUT = 300.0                    # seconds that a client may be silent: RFC 5321 4.5.3.2.7
FULL_TIMEOUT = 10.0                # the same, or without a transaction, while all slots are taken
HANDSHAKE_TIMEOUT = 10.0           # seconds that a client may take for TLS's handshake
PARTING_TIMEOUT = 1.0              # seconds to wait for QUIT after a mail, once the server stops
LOG_TIMEOUT = 1.0                  # seconds that a log line waits for room in a pipe
MIN_RATE = 500.0                   # bytes per second at which mail data has to come
DELIVERY_TIMEOUT = 540.0           # seconds for a command: clients wait 600, RFC 5321 4.5.3.2.6
KILL_DELAY = 5.0                   # seconds from a command's SIGTERM to its SIGKILL
AUTH_DELAY = 1.0                   # seconds by which the answer to a failed AUTH is late
AUTH_MEMORY = 60.0                 # seconds after a failure for which every answer to AUTH is late
GRACE = 30.0                       # seconds that the program gives mail data when it is stopped
STOP_PATIENCE = 0.5                # seconds beyond the grace that stop() waits for a `deliver`
GATHERING = 1.0                    # seconds for which replies are gathered while verbs are slow
TURN = 1.0                         # seconds of waiting for a client after which to look around
LISTEN_QUEUE = 4096                # clients that wait; the kernel may cut it, Linux to somaxconn

_MAX_REPLY_LINE = 512              # bytes, end included: RFC 5321 4.5.3.1.5
_MAX_ENDLESS_LINE = 65536          # bytes after which the end of a line is no longer waited for
_GATHERED = 4096                   # bytes of replies to gather; more are sent at once
_CHUNK = 96 * 1024                 # bytes per read: less than malloc maps and unmaps each time
_PIPE_BUF = getattr(select, "PIPE_BUF", 512)    # bytes that fit once a pipe can be written
_SHORT_PAUSE = 0.0001              # seconds until the first look at whether a command has ended

__all__ += [name for name in dir() if re.fullmatch("(?!TYPE_)[A-Z][A-Z_]+", name)]

# The time in seconds for deadlines, by a clock that test tools do not stop, as they do monotonic().
_now = (functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
        if hasattr(time, "clock_gettime") else time.monotonic)


# ---- Values -----------------------------------------------------------------------------------

class Peer:
    """Where a client is: `host`, its IP address, "" where it has none, and `port`, or None."""

    def __init__(self, host: str = "", port: int | None = None) -> None:
        self.host, self.port = host, port

    def __iter__(self) -> Iterator[str | int | None]:
        return iter((self.host, self.port))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return "[%s]:%s" % (self.host, self.port) if self.host else "a local client"


class Reply:
    """A reply: `code` (RFC 5321 4.2), `enhanced` status code (RFC 3463, "" for none), `lines`."""

    __slots__ = ("code", "enhanced", "lines")

    def __init__(self, code: int, enhanced: str, *lines: str) -> None:
        self.code, self.enhanced, self.lines = code, enhanced, lines or ("",)

    def __bytes__(self) -> bytes:
        """The reply as it is sent: printable ASCII, lines of at most 512 bytes (4.5.3.1.5)."""
        return _encode(self.code, self.enhanced, tuple(self.lines))

    def _brief(self) -> str:
        """The reply in one line, for the log."""
        return _shown("%d %s %s" % (self.code, self.enhanced, " ".join(self.lines)))


@functools.lru_cache(maxsize=64)
def _encode(code: int, enhanced: str, lines: Sequence[str]) -> bytes:
    """A reply as it is sent; cached, since the same few are sent again and again."""
    prefix = enhanced and enhanced + " "
    texts = ["%d-%s%s" % (code, prefix, _plain_ascii(line)) for line in lines]
    texts[-1] = texts[-1].replace("-", " ", 1)
    return "".join([text[:_MAX_REPLY_LINE - 2] + "\r\n" for text in texts]).encode("ascii")


def _plain_ascii(text: str) -> str:
    """`text` fit for a reply: printable ASCII, as RFC 5321 4.2 wants it."""
    return re.sub("[^ -~]", "?", re.sub(r"\s", " ", text))


class _Ended(Exception):
    """Raised to end the session, after `reply` where one is given; `reason` is for the log."""

    def __init__(self, reply: Reply | None, reason: str) -> None:
        super().__init__(reason)
        self.reply, self.reason = reply, reason


class _Failure(Exception):
    """What the two failures share: all of it but `_digit`, with which their codes begin."""

    _digit = 0

    def __init__(self, text: str = "", code: int | None = None, enhanced: str | None = None,
                 details: Sequence[str] = ()) -> None:
        super().__init__(text)
        if code is not None and not (isinstance(code, int) and code // 100 == self._digit):
            raise ValueError("the code has to be %dXX, not %r" % (self._digit, code))
        if enhanced and not re.fullmatch(r"%d(\.[0-9]{1,3}){2}" % self._digit, enhanced):
            raise ValueError("the enhanced code has to be %d.X.X, not %r" % (self._digit, enhanced))
        self.code, self.enhanced, self.details = code, enhanced, details

    def _reply(self, log: Callable[[str, str], None], default_text: str,
               permanent: tuple[int, str], temporary: tuple[int, str] = (451, "0.0")) -> Reply:
        """The reply to give; where it is not said by which code, by one of these two."""
        for line in self.details:
            log("%s", _shown(line))
        default, detail = permanent if self._digit == 5 else temporary
        text, code, enhanced = str(self)[:_MAX_REPLY_LINE], self.code or default, self.enhanced
        found = re.match(r"(%d(?:\.[0-9]{1,3}){2})(?: +|$)" % self._digit, text)
        if enhanced is None and found:      # as in a reply that is moved over from elsewhere
            enhanced, text = found.group(1), text[found.end():]
        if enhanced is None:
            if code // 10 == 53 and self.code:
                detail = "7.0"      # something about security: RFC 4954 section 6
            elif self.code and not (detail in ("1.7", "1.3") and code in (501, 553)):
                detail = "0.0"      # a code of the caller's own, of which no more is known
            enhanced = "%d.%s" % (self._digit, detail)
        return Reply(code, enhanced, text or default_text)


class TemporaryFailure(_Failure):
    """Raised by `deliver`, `check`, `authenticate` or a verb: the client should try again later.

    text: what the client is told; it may begin with the enhanced code. code: from 400 to 499, 451
    if None; 421 ends the session. enhanced: as "4.X.X" (RFC 3463), "" for none, None for what is
    known. details: lines for the log. Raises ValueError for other codes.
    """

    _digit = 4


class PermanentFailure(_Failure):
    """Raised by `deliver`, `check`, `authenticate` or a verb: the client should give up.

    As TemporaryFailure, with codes 5XX and 5.X.X; if both are None, 554 5.3.0, in `check` 553 5.1.7
    (sender) or 5.1.3 (recipient), in `authenticate` 535 5.7.8, in a verb's method 554 5.0.0.
    """

    _digit = 5


def _refuse(reply: Reply, details: Sequence[str] = ()) -> NoReturn:
    """Raise the failure that says this: whoever overrides a verb is not to take it for success."""
    kind = TemporaryFailure if reply.code < 500 else PermanentFailure
    raise kind(reply.lines[0], reply.code, reply.enhanced, details)


class Mail:
    """One mail and its envelope.

    sender: the reverse-path, "" for <>. recipients: the forward-paths, in the order accepted.
    peer: the client's Peer. helo: the name it gave. user: as whom it authenticated, or None.
    tls: whether it came over TLS. mail_options, rcpt_options: the parameters of MAIL, and those of
    all RCPTs, such as "SIZE=13" and "SMTPUTF8", their names in upper case. size: bytes of `data`.
    outcome: text for the log line, which a `deliver` may set, as Command sets "exit=0".

    A mail that is kept keeps its data, up to 128 KiB (MAX_MEMORY) in memory, more in a file, so
    that a thousand larger ones take a thousand descriptors. It can be copied and pickled, and is
    to be used by one thread at a time.
    """

    def __init__(self, sender: str, recipients: Sequence[str] = (), data: bytes = b"", *,
                 peer: Peer = Peer(), helo: str = "", user: str | None = None, tls: bool = False,
                 mail_options: Sequence[str] = (), rcpt_options: Sequence[str] = ()) -> None:
        self.sender, self.recipients = sender, list(recipients)
        self.peer, self.helo, self.user, self.tls = peer, helo, user, tls
        self.mail_options, self.rcpt_options = list(mail_options), list(rcpt_options)
        self.outcome = ""
        self._begin(data)

    def _begin(self, data: bytes) -> None:
        self._file: BinaryIO = io.BytesIO()
        self.size = 0
        if data:
            self._write(data)

    def _write(self, data: bytes) -> None:
        """Append `data`. Raises OSError if the disk is full, MemoryError if memory is."""
        if self.size + len(data) > MAX_MEMORY:
            self._ensure_descriptor()
        write = getattr(self._file, "raw", self._file).write    # now, while errors are noticed
        while data:
            written = write(data)
            self.size += written
            data = data[written:]

    def _ensure_descriptor(self) -> None:
        """Move the data, unless it is there, to where it has a descriptor. Raises OSError."""
        if isinstance(self._file, io.BytesIO):
            import weakref
            file = _temporary_file()
            try:
                file.write(self.data)
                file.flush()
            except BaseException:
                _drop(file)     # or else a kept mail would keep each that was tried in vain
                raise
            self._file = file
            # Not by __del__: the garbage collector may come to the file first, and warns of it.
            weakref.finalize(self, _drop, file).atexit = False      # then others may still want it

    @property
    def file(self) -> BinaryIO:
        """The mail data as a binary file, at its start; the same each time, not to be closed."""
        self._file.seek(0, os.SEEK_END)     # drops what is buffered, so that the next seek moves
        self._file.seek(0)                  # the descriptor, too
        return self._file

    @property
    def data(self) -> bytes:
        """The mail data, with transparency (RFC 5321 4.5.2) undone: each line, also the last, ends
        in LF, a bare CR has become a space, and all else is as it came.

        To send it on by smtplib, give that ``data.replace(b"\\n", b"\\r\\n")``.
        """
        return self.file.read()

    @property
    def message(self) -> email.message.EmailMessage:
        """The mail data, parsed anew at each use, as an email.message.EmailMessage."""
        import email
        import email.policy
        return email.message_from_binary_file(self.file, policy=email.policy.default)

    @property
    def smtputf8(self) -> bool:
        """Whether its addresses may be more than ASCII: RFC 6531."""
        return "SMTPUTF8" in self.mail_options

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": self.data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(state["_file"])     # a file of its own

    def __repr__(self) -> str:
        return "<Mail from %r to %r, %d bytes>" % (self.sender, self.recipients, self.size)


def _temporary_file() -> BinaryIO:
    """A file without a name, of mode 0600; in memory where no folder for one can be written."""
    import tempfile
    try:
        return tempfile.TemporaryFile(prefix="msmtpd-")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS) or not hasattr(
                os, "memfd_create"):
            raise
        return open(os.memfd_create("msmtpd"), "w+b")


def _drop(file: BinaryIO) -> None:
    """Close a file whose content does not matter any more."""
    with contextlib.suppress(OSError):      # what could not be written before cannot be now
        file.close()


def _understand_result(result: object) -> Reply | None:
    """The reply that `deliver` returned, None where it is no reply.

    Raises TypeError if `deliver` or `check` returned an awaitable, or what was meant to refuse:
    taken for success, either would lose the mail.
    """
    if hasattr(result, "__await__"):
        getattr(result, "close", lambda: None)()    # or else Python warns of it later
        raise TypeError("deliver and check have to be plain functions, not async ones")
    if result is False or isinstance(result, str) and re.match("[45][0-9]{2}([ -]|$)", result):
        raise TypeError("to refuse, raise TemporaryFailure or PermanentFailure; %r was returned"
                        % (result,))
    said = isinstance(result, str) and re.fullmatch(
        r"250 (?:(2(?:\.[0-9]{1,3}){2})(?: |$))?(.*)", result, re.DOTALL)
    return Reply(250, said.group(1) or "2.0.0", said.group(2) or "Delivered") if said else None


# What all sessions of a server share: see Server's arguments; `checks` are asked in turn, and
# `room` is what the command can take of recipients, in bytes as MAX_RECIPIENT_BYTES counts them.
_Settings = collections.namedtuple("_Settings", "deliver checks room authenticate auth_required "
                                   "tls starttls received max_size timeout")


# ---- Log --------------------------------------------------------------------------------------

_DEBUG, _INFO, _ERROR = 10, 20, 40      # as in logging, whose import would cost inetd users a lot


class _Log:
    """Where lines go. A log that fails changes no reply and ends no thread.

    logger: None for who wants no log: errors are lines on standard error, the rest is dropped.
    stderr: where who started the program is told; None for nobody, as where the log is there, too.
    """

    def __init__(self, logger: Logger | None, stderr: _Outlet | None = None,
                 prefix: str = "") -> None:
        self._logger, self._stderr, self._prefix = logger, stderr, prefix
        self.informing = logger is not None and logger.isEnabledFor(_INFO)
        self.debugging = logger is not None and logger.isEnabledFor(_DEBUG)

    def of_session(self, number: int) -> _Log:
        """The log of one session, whose lines carry its number."""
        return _Log(self._logger, self._stderr, "session %d: " % number)

    def error(self, message: str, *values: object, exc_info: bool = False) -> None:
        """Log what somebody has to see to; exc_info: with the traceback of the exception."""
        self._put(_ERROR, message, values, exc_info)

    def info(self, message: str, *values: object) -> None:
        """Log what happened."""
        if self.informing:
            self._put(_INFO, message, values)

    def debug(self, message: str, *values: object) -> None:
        """Log a line of the dialogue."""
        if self.debugging:
            self._put(_DEBUG, message, values)

    def _put(self, level: int, message: str, values: Sequence[object],
             exc_info: bool = False) -> None:
        with contextlib.suppress(Exception):
            if self._logger is not None:
                self._logger.log(level, self._prefix + message, *values, exc_info=exc_info)
                return
            text = self._prefix + message % tuple(values)
            if exc_info:
                import traceback
                text += "\n" + traceback.format_exc().rstrip()
            self.tell(text)

    def tell(self, text: str, level: int = 0) -> None:
        """Tell who started the program, on standard error, and log that at `level`, if not 0."""
        if level and self._logger is not None:
            self._put(level, "%s", (text,))
        if self._stderr is not None:
            with contextlib.suppress(OSError):
                self._stderr.write("msmtpd: %s\n" % text)


class _Outlet(io.FileIO):
    """Where log lines go, as text. Where that is a pipe that nobody reads, one waits for
    LOG_TIMEOUT, and is dropped; those behind it are, too, until there is room again.
    """

    _stuck = False

    def write(self, text: Any) -> int:
        """Write all of `text`, or drop what is left of it."""
        left = text.encode("utf-8", "backslashreplace")
        while left:
            if os.name == "posix":      # elsewhere only sockets can be waited for
                seconds = 0.0 if self._stuck else LOG_TIMEOUT
                self._stuck = not _ready((), (self.fileno(),), seconds)
            if self._stuck:
                break
            left = left[os.write(self.fileno(), left[:_PIPE_BUF]):]
        return len(text)


def _ready(readers: Iterable[int], writers: Iterable[int], seconds: float) -> list[int]:
    """Those of these descriptors that are ready, or have an error, within `seconds`."""
    if not hasattr(select, "poll"):         # as under eventlet
        ready = select.select(readers, writers, (), seconds)
        return ready[0] + ready[1]
    poll = select.poll()
    for descriptor in readers:
        poll.register(descriptor, select.POLLIN)
    for descriptor in writers:
        poll.register(descriptor, select.POLLOUT)
    return [descriptor for descriptor, _ in poll.poll(1000 * seconds)]


def _why(error: BaseException) -> str:
    """What an exception says, or its name: many a MemoryError says nothing."""
    return str(error) or type(error).__name__


def _shown(value: str) -> str:
    """`value`, which came from outside, fit for a log line: escaped, and cut."""
    return repr(value[:MAX_LOGGED])[1:-1][:MAX_LOGGED]


# ---- Grammar: pure functions on text ----------------------------------------------------------

# RFC 5321 4.1.2 and RFC 6531 3.3, but more forgiving: dots may be anywhere in a local part and at
# the end of a domain, and underscores and hyphens anywhere in its labels.
_ATEXT = r"""[^\x00-\x20\x7f"(),:;<>@\[\\\]]+"""
_QUOTED_STRING = r'"(?:[^\x00-\x1f\x7f"\\]|\\[ -~])*"'
# Letters, digits, - and _, as a negated set: one that reaches to U+10FFFF takes 45 ms to compile.
_LABEL = r"[^\x00-,./:-@\[-^`{-\x7f]+"
_DOMAIN = r"(?:{0}(?:\.{0})*\.?|\[[0-9A-Za-z.:]+\])".format(_LABEL)
# What shapes letters of Persian and Indic scripts; domains may hold it: RFC 5892 A.1, A.2.
_JOINERS = r"(?<=[^\x00-\x7f])[\u200c\u200d]"
# A source route is dropped, so its domains are not checked.
_ROUTE = r"""(?:@(?:\[[^\s\[\]<>@,]*\]|[^\s"\[\]<>@,:]+)(?:,(?=@)|:(?!@)))*"""
# Some clients write a comment behind the address, as in a header.
_COMMENT = r"(?:[ \t]*\([^()]*\))?"
_PATH = re.compile(
    r"[ \t]*(?P<angle><[ \t]*{3})?(?:(?P<mailbox>{0}(?:@{2})?|{1}@{2}){4})?(?(angle)[ \t]*>{4})"
    r"(?:[ \t]+(?P<rest>.*))?".format(_ATEXT, _QUOTED_STRING, _DOMAIN, _ROUTE, _COMMENT))

# Parameters, and what may stand behind their names: those that are offered (RFC 1870 6.1, RFC 6152,
# RFC 6531 3.4), and those that some clients send although they are not.
_PARAMETERS = {"FROM": {"SIZE": "=[0-9]{1,20}", "BODY": "=(7BIT|8BITMIME)", "SMTPUTF8": "",
                        "AUTH": "(=.*)?", "RET": "(=.*)?", "ENVID": "(=.*)?"},
               "TO": {"NOTIFY": "(=.*)?", "ORCPT": "(=.*)?"}}

_INERT = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@._+/=:%,-"

# Requests of HTTP: by methods that web pages can make a browser send, or others do, or by the end.
_HTTP_REQUEST = re.compile(
    br"(?:CONNECT|DELETE|GET|HEAD|OPTIONS|PATCH|POST|PRI|PROPFIND|PUT|TRACE)(?: |$)"
    br"|[^\n]* HTTP/[0-9](?:\.[0-9])?$", re.IGNORECASE)


def _split_line(line: bytes) -> tuple[str, str]:
    """Split a client's line, without its end, into its verb in upper case and its argument.

    Raises PermanentFailure saying what is wrong with its bytes.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError:
        # Windows names hosts in its code page, and such a client would never get beyond its EHLO.
        if line[:5].upper().rstrip() not in (b"EHLO", b"HELO"):
            raise PermanentFailure("Not UTF-8", 500, "5.5.2") from None
        text = line.decode("latin-1")
    if not text.isprintable() and re.search("[\x00-\x08\x0a-\x1f\x7f]", text):
        raise PermanentFailure("Control character", 500, "5.5.2")
    text = text.strip(" \t")
    verb = text.partition(" ")[0].partition("\t")[0]
    return (verb.upper() if verb.isascii() else ""), text[len(verb):].lstrip(" \t")


@functools.lru_cache(maxsize=64)
def _parse_envelope(argument: str, keyword: str) -> tuple[str, dict[str, str]]:
    """Read ``FROM:<path> parameters``, `keyword` being ``FROM`` or ``TO`` (RFC 5321 4.1.1.2, 3).

    Returns the address ("" for <>; a source route is dropped) and the parameters. Raises
    PermanentFailure.
    """
    name, colon, text = argument.partition(":")
    if not colon or name.upper() != keyword:
        raise PermanentFailure("Syntax is %s:<address>" % keyword, 501, "5.5.2")
    match = _PATH.fullmatch(text)
    angle, address, rest = match.group("angle", "mailbox", "rest") if match else ("", None, "")
    if address is None:
        address, valid = "", keyword == "FROM" and angle and angle.strip(" \t") == "<"
    else:
        # A leading hyphen could make it an option of the command; nobody can see the unprintable.
        visible = address.isprintable() or re.sub(_JOINERS, "", address).isprintable()
        valid = visible and not address.startswith("-") and (
            not address.endswith("]") or _is_address_literal(address.rpartition("[")[2][:-1]))
    if not valid:
        raise PermanentFailure("Bad address syntax", 501, "5.1.7" if keyword == "FROM" else "5.1.3")
    return address, _parse_parameters(rest or "", _PARAMETERS[keyword])


def _is_address_literal(text: str) -> bool:
    """Whether that is what brackets may hold in place of a domain: RFC 5321 4.1.3."""
    import socket
    is_ipv6 = text.upper().startswith("IPV6:")
    try:
        socket.inet_pton(socket.AF_INET6 if is_ipv6 else socket.AF_INET, text[5 * is_ipv6:])
    except OSError:
        return False
    return True


def _parse_parameters(text: str, known: dict[str, str]) -> dict[str, str]:
    """Read ``NAME=value NAME`` (RFC 5321 4.1.2): these words by their names, in upper case."""
    parameters: dict[str, str] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        name = name.upper() if name.isascii() else ""
        if name not in known and re.fullmatch("[0-9A-Z][0-9A-Z-]*", name):
            raise PermanentFailure("Unknown parameter", 555, "5.5.4")
        if (name not in known or name in parameters
                or not re.fullmatch(known[name], equals + value, re.IGNORECASE)):
            raise PermanentFailure("Bad parameter", 501, "5.5.4")
        parameters[name] = name + equals + value
    return parameters


def _is_inert(address: str) -> bool:
    """Whether no shell, the command's own or one behind it, can read `address` as code."""
    return not address.strip(_INERT) or all(
        c in _INERT or (c > "\x7f" and c.isalpha()) for c in address)


def _refuse_http(line: bytes, first: bool = False) -> None:
    """Raise _Ended for HTTP (RFC 9112 3): a web page could put a mail behind its request.

    first: whether neither a greeting nor an error came before, so that a header field is suspect.
    """
    line = line.strip()
    if _HTTP_REQUEST.match(line) or first and re.match(b"[0-9A-Za-z-]+:", line):
        raise _Ended(Reply(421, "4.7.0", "This is no web server"), "the client spoke HTTP")


def _decode_text(raw: bytes) -> str:
    """A user name or a password, which may be in Latin-1 (Emacs, Tcl), or begin with a BOM."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


# ---- Mail data --------------------------------------------------------------------------------

_DOT, _CR = b".\r"      # numbers: looking for bytes in bytes costs an exception, caught by Python


class _MailData:
    """Finds the end of mail data in pieces cut anywhere, and turns it into lines that end in LF.

    One leading dot of a line is removed (RFC 5321 4.5.2). All CRs before a LF belong to that line
    end, since some clients convert line ends twice. Any other CR, which the next server might take
    for the end of a line (SMTP smuggling), becomes a space.

    ended: whether the end was found. rest: what came behind it. size: bytes before it so far.
    """

    def __init__(self, line_end: bytes, bare_lf: bool) -> None:
        # People at a terminal and printf | nc end lines in a bare LF; another server never does.
        self._ends = (b"\r\n.\r\n", b"\n.\n") if bare_lf else (b"\r\n.\r\n",)
        # The data is read with the line end of DATA before it, so that empty data ends like any.
        self.tail = line_end        # the last bytes, if they may be the beginning of the end
        self._skip = b"\n"          # what to skip where lines begin: that line end, then a dot
        self._held = 0              # CRs before the next piece: whether a LF follows is not known
        self.ended = False
        self.rest = b""
        self.size = -len(line_end)

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Take the next piece; return what is certain now of the lines.

        That is what stands before the end, or before what may be its beginning: mostly all of the
        piece, and then no byte is copied.
        """
        data, self.tail = self.tail + piece, b""
        found = []
        if _DOT in data:        # one byte is found ten times as fast as a string
            found = [(data.find(end), end) for end in self._ends if end in data]
        if found:
            at, end = min(found)
            self.ended, self.rest = True, data[at + len(end):]
            data = data[:at + end.index(b".")]
        elif self._skip == b"\n" and len(data) < 16:    # as _store looks for ">From " in one piece
            data, self.tail = b"", data
        elif data.endswith((b"\r", b"\n", b".")):       # as does each beginning of an end
            data, self.tail = data[:-4], data[-4:]
        self.size += len(data)
        return self._decode(data)

    def _decode(self, certain: bytes) -> Iterator[bytes]:
        """Yield these bytes as lines that end in LF, without the dots of transparency."""
        lines = certain.rstrip(b"\r")
        held, self._held = self._held, len(certain) - len(lines)
        if not lines:
            self._held += held
            return
        if held and not lines.lstrip(b"\r").startswith(b"\n"):
            self._skip = b""
            for left in range(held, 0, -_CHUNK):
                yield b" " * min(left, _CHUNK)
        if _CR in lines:
            with_crs, lines = lines, lines.replace(b"\r", b"")
            # By single bytes, which are found fastest: was each CR the one before a LF?
            if lines.replace(b"\n", b"\r\n") != with_crs:
                lines = b"\n".join([line.rstrip(b"\r") for line in with_crs.split(b"\n")])
                lines = lines.replace(b"\r", b" ")
        skip, self._skip = self._skip, b"." if lines.endswith(b"\n") else b""
        if _DOT in lines:
            lines = lines.replace(b"\n.", b"\n")
        yield lines[len(skip):] if lines.startswith(skip) else lines


def _received_line(mail: Mail, host: str, greeted: str) -> bytes:
    """The trace field (RFC 5321 4.4) of a mail that `host` receives now, by SMTP or ESMTP."""
    name = mail.helo or "unknown"
    if not re.fullmatch(r"[0-9A-Za-z._:\[\]-]{1,255}", name):
        name = "invalid"
    address = mail.peer.host.partition("%")[0]
    origin = " ([%s%s])" % ("IPv6:" if ":" in address else "", address) if address else ""
    # As RFC 3848 and RFC 6531 4.3 name it. No name has these behind SMTP: who used them spoke
    # ESMTP, whatever the last greeting was.
    extensions = ("S" if mail.tls else "") + ("A" if mail.user is not None else "")
    protocol = "UTF8SMTP" if mail.smtputf8 else "ESMTP" if extensions else greeted
    date = _date(int(time.time()), time.timezone, time.tzname)
    return ("Received: from %s%s\n\tby %s (msmtpd) with %s%s;\n\t%s\n" % (
        name, origin, host, protocol, extensions, date)).encode("ascii", "replace")


@functools.lru_cache(maxsize=1)
def _date(now: int, *zone: object) -> str:
    """That second, in local time, as RFC 5322 3.3 has it; cached, while `zone` stays the same."""
    local = time.localtime(now)     # without an argument, freezegun's knows no zone
    # Not by strftime(), whose names follow the locale; email.utils is slow to import.
    day, month, date, clock, year = time.asctime(local).split()
    return "%s, %s %s %s %s %s" % (day, date, month, year, clock, time.strftime("%z", local))


# ---- Wire: the client's connection, as lines, pieces and deadlines ----------------------------

# A wait for the client has a deadline, a time since when the client has done nothing useful, from
# which FULL_TIMEOUT counts while all slots are taken, and a kind, by which a stop ends it: that for
# a verb at once, any other when the grace is over, then that for the verb behind a mail that was
# delivered while stopping, and last, which is the server's wait, that for a delivery.
_VERB, _DATA, _PARTING, _DELIVERY = range(4)


class _Slots:
    """What sessions share while they are served: whether all slots are taken, and whether to end.

    free: the threads that could take a further client; under inetd, one that is never taken.
    waiting: who waits for a client, and how. To add to these and to take from them needs no lock,
    unlike counting. late_until: when answers to AUTH cease to be late, for guessers in any session.
    """

    def __init__(self) -> None:
        self.free = {0}
        self.waiting: dict[_Wire, Wait] = {}
        self.late_until = float("-inf")
        self.stopping = False
        self._ends_at = [0.0] + 3 * [float("inf")]      # when a wait ends, once stopping

    def ends(self, kind: int) -> bool:
        """Whether, once the server stops, a wait of this kind has to end now."""
        return _now() >= self._ends_at[kind]

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until a stop."""
        end = _now() + seconds
        while not self.stopping and _now() < end:
            time.sleep(max(0.0, min(0.1, end - _now())))

    def stop(self, grace: float, patience: float) -> None:
        """Begin to end the sessions, as Server.stop says; a further call can only shorten this.

        Signal handlers call it, so it takes no lock, as setting an Event does: the code that they
        interrupt might hold it.
        """
        # A delivery is left behind a moment after the last farewell.
        for kind, seconds in (_DATA, 0.0), (_PARTING, patience), (_DELIVERY, patience + 0.2):
            self._ends_at[kind] = min(self._ends_at[kind], _now() + grace + seconds)
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        """Wake those who wait though they have to end now, by shutting what they read from.

        That cannot be undone, but who has just ceased to wait looks at the stop before it goes on.
        """
        for wire, (_, _, kind) in self.waiting.copy().items():
            if self.ends(kind):
                wire.shut(_SHUT_RD)


class _Descriptors:
    """Two descriptors in place of a socket, pipes or a terminal, whose flags others may share."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink

    def recv(self, size: int) -> bytes:
        if not _ready((self._source,), (), TURN):
            raise BlockingIOError(errno.EAGAIN, "nothing to read")
        return os.read(self._source, size)

    def send(self, data: bytes) -> int:
        if not _ready((), (self._sink,), TURN):
            raise BlockingIOError(errno.EAGAIN, "no room to write")
        return os.write(self._sink, data[:_PIPE_BUF])

    def close(self, *values: object) -> None:
        """Left to the end of the process."""

    settimeout = shutdown = close


_SHUT_RD, _SHUT_WR, _SHUT_RDWR = range(3)       # as in `socket`, which pipes do without


def _taking_turns(connection: socket.socket) -> socket.socket:
    """Return the socket, whose calls from now on wait for no longer than TURN, or a part of it.

    By the kernel where it can: for a timeout of its own, Python asks poll(2) before each call. But
    under gevent the socket is not the system's, and its descriptor never blocks.
    """
    import socket
    import struct
    if not isinstance(connection, socket.socket):       # eventlet's accept returns the system's
        connection = socket.socket(fileno=connection.detach())
    try:
        if not os.get_blocking(connection.fileno()):
            connection.setblocking(True)        # on BSDs, an accepted one is what the listener is
            if not os.get_blocking(connection.fileno()):
                raise OSError       # which here means: not by the kernel
        # Shorter turns for who sends, whom a stop cannot wake.
        for option, turn in (socket.SO_RCVTIMEO, TURN), (socket.SO_SNDTIMEO, TURN / 5):
            connection.setsockopt(socket.SOL_SOCKET, option,
                                  struct.pack("ll", int(turn), int(1e6 * (turn % 1))))
    except (AttributeError, OSError):
        connection.settimeout(TURN / 5)
    return connection


class _Wire:
    """The client's connection, read by lines or pieces; replies are gathered and sent together.

    Whoever waits for the client does so in turns of at most TURN, and looks after each at the
    deadline, at the slots and whether the server stops. All methods that wait, but close, raise
    _Ended where the wait is over, or the client has left.
    """

    def __init__(self, connection: Connection, slots: _Slots, timeout: float) -> None:
        self._connection, self.slots, self._timeout = connection, slots, timeout
        self.input = b""            # what was read, but not yet returned
        self._output = b""
        self._gathered = 0.0        # when the first of it was
        self._unheard = False       # the client has closed, and takes no more replies
        self._waiting = slots.waiting
        self._shutdown = connection.shutdown

    def read_line(self, since: float, kind: int) -> bytes:
        """Return the next line, its end included, of up to _MAX_ENDLESS_LINE bytes."""
        wait = _now() + (self._timeout if kind == _VERB else PARTING_TIMEOUT), since, kind
        if self.slots.stopping:         # also where there is input, by PIPELINING
            self.look_around(wait)
        data = self.input or self._pull(wait)
        while True:
            if data[0] == 22 and data[1:2] == b"\x03":      # RFC 8446 5.1: a handshake record
                raise _Ended(None, "the client spoke TLS to a plain port")
            size = data.find(b"\n") + 1
            if (size or len(data)) > _MAX_ENDLESS_LINE:
                _refuse_http(data)
                raise _Ended(Reply(421, "4.5.2", "Endless line"), "endless line")
            if size:
                self.input = data[size:]
                return data[:size]
            data += self._pull(wait)

    def read_piece(self, start: float, received: int) -> bytes:
        """Return what comes next of mail data that began at `start`, `received` bytes so far.

        A client may be silent for the timeout, and take as long and what MIN_RATE allows.
        """
        now = _now()
        deadline = self._timeout + min(now, start + received / MIN_RATE)
        piece, self.input = self.input, b""
        return piece or self._pull((deadline, now, _DATA))

    def write(self, data: bytes) -> None:
        """Send `data`, at the latest before the next wait for the client."""
        now = _now()
        if not self._output:
            self._gathered = now
        self._output += data
        if len(self._output) > _GATHERED or now - self._gathered > GATHERING:
            self.flush()

    def flush(self, timeout: float | None = None) -> None:
        """Send what `write` has gathered, waiting while the client does not read.

        If the client has closed the connection, that is no error, and nothing more is sent: what it
        sent before is still to be read.
        """
        data, self._output = self._output, b""
        now = _now()
        wait = now + (self._timeout if timeout is None else timeout), now, _DATA
        try:
            while data and not self._unheard:
                data = data[self._in_turns(self._connection.send, data, wait):]
                if data:
                    self.look_around(wait)
        except ConnectionError:
            self._unheard = True
        except OSError as error:
            raise _Ended(None, "cannot send: %s" % _why(error)) from None

    def start_tls(self, context: ssl.SSLContext) -> str:
        """Go on within TLS; return its version. Raises OSError, such as ssl.SSLError, too.

        What came in plain text before is dropped (CVE-2021-38371 and its kind).
        """
        import socket
        self.flush()
        self.input = b""
        assert not isinstance(self._connection, _Descriptors)
        secured = context.wrap_socket(self._connection, server_side=True,
                                      do_handshake_on_connect=False)
        self._connection = secured
        # OpenSSL says no farewell after an end that may be an attacker's, so that who waits is not
        # woken, but sees a stop at the end of the turn.
        self._waiting = {}
        secured.settimeout(TURN / 5)
        # Not its own, which would go on in plain text, as another thread may still do meanwhile.
        plain = socket.socket if hasattr(socket.socket, "shutdown") else type(secured)  # gevent's
        self._shutdown = functools.partial(plain.shutdown, secured)
        now = _now()
        wait = now + min(HANDSHAKE_TIMEOUT, self._timeout), now, _VERB
        self._in_turns(lambda _: secured.do_handshake(), None, wait)
        return secured.version() or ""

    def shut(self, how: int) -> None:
        """End one direction of the connection, or both. May be called in other threads."""
        with contextlib.suppress(OSError):      # closed or broken before
            self._shutdown(how)

    def close(self, farewell: bytes, linger: bool) -> None:
        """Send `farewell` if the client takes it within a second, or else give it up; close.

        linger: whether to read and drop for a while what the client still sends, as it does not
        expect the end: a socket that is closed with unread input is reset, and the client may
        never see the farewell.
        """
        self._output += farewell
        try:
            self.flush(0.1 if self.slots.stopping else 1.0)
            if hasattr(self._connection, "unwrap"):
                # Say the end of TLS (RFC 8446 6.1), but do not wait for the answer.
                self._connection.settimeout(0)
                with contextlib.suppress(OSError, ValueError):
                    self._connection.unwrap()
            if linger:
                self.shut(_SHUT_WR)
                self._connection.settimeout(0.1)
                deadline = _now() + (1.0 if self.slots.free else 0.1)   # if others wait for it
                while True:
                    self._pull((deadline, deadline, _VERB))
        except (_Ended, OSError):
            pass
        finally:
            self._connection.close()

    def _pull(self, wait: Wait) -> bytes:
        """Return the client's next bytes, after sending it what is gathered."""
        if self._output:
            self.flush()
        self._waiting[self] = wait
        try:
            self.look_around(wait)
            data: bytes = self._in_turns(self._connection.recv, _CHUNK, wait)
        except OSError:
            data = b""
        finally:
            del self._waiting[self]
        if self.slots.stopping:         # it may have been woken
            self.look_around(wait)
        if not data:
            raise _Ended(None, "the client left")
        return data

    def _in_turns(self, call: Callable[[Any], Any], argument: object, wait: Wait) -> Any:
        """Return what `call` does, which is called again after each turn of waiting in vain."""
        while True:
            try:
                return call(argument)
            except OSError as error:        # None is a timeout's of Python's own
                if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, None):
                    raise
            self.look_around(wait)

    def look_around(self, wait: Wait) -> None:
        """Raise _Ended where the wait is over: by its deadline, for others, or by a stop."""
        deadline, since, kind = wait
        slots, now = self.slots, _now()
        is_late = now >= deadline or not slots.free and now >= since + FULL_TIMEOUT
        if slots.stopping and (is_late or slots.ends(kind)):
            raise _Ended(Reply(421, "4.3.2", "Shutting down"), "the server stops")
        if is_late:
            raise _Ended(Reply(421, "4.4.2", "Waited for too long"),
                         "the client was silent or too slow")


# ---- Session: one method for each verb --------------------------------------------------------

class Session:
    """One client's dialogue, made by a Server. To change what a verb does, override its method.

    A method takes the verb's argument, a str without outer white space, and returns a Reply, or
    None for no reply but those that it has sent itself; it may raise either failure, as the
    methods of this class do to refuse: that is to be let through. 221 and 421 end the session, and
    so does any other exception. A further verb needs a method and an entry in VERBS.

    >>> import msmtpd, smtplib
    >>> class Grumpy(msmtpd.Session):
    ...     def do_RCPT(self, argument):
    ...         if "nobody@" in argument:
    ...             return msmtpd.Reply(550, "5.1.1", "No such user here")
    ...         return super().do_RCPT(argument)
    >>> with msmtpd.Server(deliver=print, session=Grumpy) as server:
    ...     client = smtplib.SMTP(server.host, server.port)
    ...     _ = client.ehlo(), client.mail("a@example.org")
    ...     print(client.rcpt("nobody@example.org"))
    (550, b'5.1.1 No such user here')

    More ways to be a bad server:

        hostname = "mx.example.org"         # a class attribute: another name
        def extensions(self):               # one that is not offered
            return [e for e in super().extensions() if e != "PIPELINING"]
        self.send(b"250-half a li")         # in a method: raw bytes, malformed or half a line,
        self.flush(); time.sleep(9)         # sent at once; then a stall
        line = self.read_line()             # the client's next line, as it came
        self.flush(); self.close()          # the end of the connection, also from another thread

    number: of this session in its server, from 1. peer: the client's Peer. helo: the name it
    gave, "" before that. user: as whom it authenticated, or None. tls: whether TLS is spoken.
    mail: the very Mail that `deliver` gets, from MAIL to the end of the mail data, or None.
    """

    hostname = "localhost"      # as it greets, and names itself in the Received line

    def __init__(self, wire: _Wire, settings: _Settings, log: _Log, number: int,
                 peer: Peer) -> None:
        self.number, self.peer = number, peer
        self.helo = ""
        self.user: str | None = None
        self.tls = False
        self.mail: Mail | None = None
        self._wire, self._settings, self._log = wire, settings, log
        self._client_field = " client=[%s]" % peer.host if peer.host else ""    # of log lines
        self._protocol = ""         # by the last greeting, "" before that
        self._room = 0.0            # bytes left for further recipients of the transaction
        self._line = b""            # the last one that was read
        self._bare_lf = True        # each line so far ended in LF without CR
        self._errors = 0            # of the protocol
        self._undelivered = False   # at least one mail was not delivered
        self._after_data = False    # the last reply was one to mail data
        self._last_use = _now()     # when the last transaction ended, or the session began

    def _run(self) -> bool:
        """Serve the client to the end, and close the connection; raise nothing.

        Returns whether all went well: no 421, no transaction cut off, each mail delivered.
        """
        reply: Reply | None
        self._log.info("connect from %s", self.peer)
        try:
            reply = self._converse()
            reason = "QUIT" if reply.code == 221 else "by the server: " + reply._brief()
        except _Ended as end:
            reply, reason = end.reply, end.reason
            if self.mail:
                reason = "in mid-transaction, " + reason
        except BaseException:
            self._log.error("internal error", exc_info=True)
            reply, reason = Reply(421, "4.3.0", "Internal error"), "internal error"
        if reply and self._log.debugging:
            self._log.debug("S: %s", reply._brief())
        self._log.info("closed: %s", reason)
        self._wire.close(bytes(reply) if reply else b"", bool(reply and reply.code != 221))
        return not (self.mail or self._undelivered or reply and reply.code == 421)

    # The dialogue

    def _converse(self) -> Reply:
        """Greet, and answer line by line; return the reply that ends the session."""
        if self._settings.tls and not self._settings.starttls:
            self._start_tls()
        reply = self.greet()
        while reply is None or reply.code not in (221, 421):        # RFC 5321 3.8
            if reply is not None:
                self.send(reply)
            reply = self._answer()
        return reply

    def greet(self) -> Reply | None:
        """The first reply: RFC 5321 3.1."""
        return Reply(220, "", self.hostname + " ESMTP msmtpd")

    def extensions(self) -> list[str]:
        """What EHLO offers, a line each: RFC 5321 4.1.1.1."""
        lines = ["PIPELINING", "SIZE %d" % self._settings.max_size, "8BITMIME", "SMTPUTF8",
                 "ENHANCEDSTATUSCODES"]
        if self._settings.tls and not self.tls:
            lines.append("STARTTLS")
        # Not by its truth: an object, such as a table that is still empty, may be false.
        elif self._settings.authenticate is not None:
            lines.append("AUTH " + " ".join(_MECHANISMS))
        return lines

    def send(self, reply: Reply | bytes) -> None:
        """Send a reply, or raw bytes, at the latest before the next wait for the client."""
        data = bytes(reply)
        if self._log.debugging:
            for line in data.decode("ascii", "backslashreplace").splitlines():
                self._log.debug("S: %s", line)
        self._wire.write(data)

    def flush(self) -> None:
        """Send what was said so far, now."""
        self._wire.flush()

    def read_line(self) -> bytes:
        """Return the client's next line as it came, its end included; raises if there is none."""
        kind = _PARTING if self._after_data and self._wire.slots.stopping else _VERB
        line = self._wire.read_line(_now() if self.mail else self._last_use, kind)
        self._after_data, self._line = False, line
        self._bare_lf = self._bare_lf and line[-2:] != b"\r\n"
        if kind == _PARTING and line.strip().upper() != b"QUIT":
            self._wire.look_around((0.0, 0.0, _VERB))       # a wait that a stop has ended
        return line

    def close(self) -> None:
        """End the connection, and so the session; flush() before what was said. In any thread."""
        self._wire.shut(_SHUT_RDWR)

    def _answer(self) -> Reply | None:
        """Read one line and return the reply to it, None for no further one."""
        verb = argument = ""
        reply: Reply | None
        try:
            line = self.read_line()
            if line.find(b" HTTP/") > 0:    # any verb may be the method of a request
                _refuse_http(line)
            verb, argument = _split_line(line.rstrip(b"\r\n"))
            if len(line) > (MAX_AUTH_LINE if verb == "AUTH" else MAX_LINE):
                raise PermanentFailure("Line too long", 500, "5.5.2")
            if self._log.debugging:
                # A client whose AUTH was refused may send the password all the same, as a verb.
                # What a verb that a subclass adds says, this class cannot know.
                said = verb + " " + argument if verb in _OPEN_VERBS else verb
                self._log.debug("C: %s", _shown(said) if verb in self.VERBS else "(hidden)")
            method = self._require(self.VERBS.get(verb), "Unknown command", 500)
            reply = getattr(self, method)(argument)
            if verb in _PROTOCOLS and (reply is None or reply.code == 250):
                self._reset()
                self.helo, self._protocol = argument, _PROTOCOLS[verb]
        except _Failure as failure:
            # Here, since no verb of ours is a method of HTTP.
            _refuse_http(self._line, first=not (self._protocol or self._errors))
            reply = failure._reply(self._log.info, "Refused", (554, "0.0"))
            # RFC 3463 3.6 has 5.5.X for errors of the protocol. But where one verb of a pipelined
            # transaction is refused, all that follow are out of order.
            self._errors += reply.enhanced.startswith("5.5.") and reply.code != 503
        if self._errors >= MAX_ERRORS:
            raise _Ended(Reply(421, "4.7.0", "Too many errors"), "errors")
        if reply and reply.code >= 400 and verb in ("MAIL", "RCPT"):
            self._log.info("refused %s %s: %s", verb, _shown(argument), reply._brief())
        return reply

    # The verbs, in the order of a session

    def do_EHLO(self, argument: str) -> Reply | None:
        """Greet the client and tell it the extensions: RFC 5321 4.1.1.1."""
        return Reply(250, "", self.hostname, *self.extensions())

    def do_HELO(self, argument: str) -> Reply | None:
        """Greet the client: RFC 5321 4.1.1.1."""
        return Reply(250, "", self.hostname)

    def do_STARTTLS(self, argument: str) -> Reply | None:
        """Go on within TLS, as if the session had just begun: RFC 3207."""
        self._require(self._settings.tls, "STARTTLS is not offered", 502)
        self._require(not self.tls, "Already in TLS")
        self._require(not argument, "STARTTLS takes no argument", 501, "5.5.4")
        self.send(Reply(220, "2.0.0", "Go ahead"))
        self._start_tls()
        return None

    def do_AUTH(self, argument: str) -> Reply | None:
        """Authenticate the client: RFC 4954."""
        self._require(self._settings.authenticate is not None, "AUTH is not offered", 502)
        self._require(self.tls or not self._settings.tls, "Say STARTTLS first", 538, "5.7.11")
        # HELO will do: clients that read one line a reply cannot say EHLO.
        self._require(self._protocol, "Say EHLO first")
        self._require(self.user is None, "Authenticated already")
        self._require(self.mail is None, "Not allowed in a transaction")
        name, *initial = re.split("[ \t]+", argument, maxsplit=1)
        mechanism = self._require(_MECHANISMS.get(name.upper()), "Mechanisms are "
                                  + " and ".join(_MECHANISMS), 504, "5.5.4")
        user, password = mechanism(self.ask, _decode_response(initial[0]) if initial else None)
        return self._authenticate(user, password)

    def do_MAIL(self, argument: str) -> Reply | None:
        """Begin a transaction: RFC 5321 4.1.1.2."""
        self._require(self._protocol, "Say EHLO first")
        self._require(self.mail is None, "In a transaction already")
        if self._settings.auth_required and self.user is None:
            first = "; say STARTTLS first" if self._settings.tls and not self.tls else ""
            raise PermanentFailure("Authentication required" + first, 530, "5.7.0")
        sender, parameters = _parse_envelope(argument, "FROM")
        if 0 < self._settings.max_size < int(parameters.get("SIZE", "SIZE=0")[5:]):
            _refuse(self._too_big())
        mail = Mail(sender, peer=self.peer, helo=self.helo, user=self.user, tls=self.tls,
                    mail_options=list(parameters.values()))
        self._ask_checks(sender, mail, "1.7")
        self.mail, self._room = mail, min(MAX_RECIPIENT_BYTES, self._settings.room)
        return Reply(250, "2.1.0", "Sender accepted")

    def do_RCPT(self, argument: str) -> Reply | None:
        """Add a recipient: RFC 5321 4.1.1.3."""
        mail = self._require(self.mail, "Say MAIL first")
        recipient, parameters = _parse_envelope(argument, "TO")
        size = len(recipient.encode()) + 9      # as an argument, with its end and a pointer to it
        if len(mail.recipients) >= MAX_RECIPIENTS or size > self._room:
            raise TemporaryFailure("Too many recipients; send the rest separately", 452, "4.5.3")
        mail.recipients.append(recipient)       # by which `check` tells it from the sender
        try:
            self._ask_checks(recipient, mail, "1.3")
        except _Failure:
            mail.recipients.pop()
            raise
        mail.rcpt_options += parameters.values()
        self._room -= size
        return Reply(250, "2.1.5", "Recipient accepted")

    def do_DATA(self, argument: str) -> Reply | None:
        """Take the mail data, and deliver: RFC 5321 4.1.1.4."""
        mail = self._require(self.mail, "Say MAIL first")
        self._require(mail.recipients, "Recipients first")
        self._require(not argument, "DATA takes no argument", 501, "5.5.4")
        self.send(Reply(354, "", "Send the mail, then a line with only a dot"))
        self.flush()        # so that the client sends while the rest is made ready
        problem = self._read_mail_data(mail)
        self.mail = None
        started = _now()
        reply = problem or self._deliver(mail)
        if reply.code == 250:
            self._errors = 0    # some clients send a blank line, or an unknown verb, with each mail
        else:
            self._undelivered = True
        self._last_use = _now()
        self._log_mail(mail, reply, self._last_use - started)
        self._after_data = True
        return reply

    def do_BDAT(self, argument: str) -> Reply | None:
        """End the session, before the data that follows is taken for verbs: RFC 3030."""
        raise _Ended(Reply(503, "5.5.1", "BDAT is not offered"), "BDAT")

    def do_RSET(self, argument: str) -> Reply | None:
        """Give up the transaction: RFC 5321 4.1.1.5."""
        self._require(not argument, "RSET takes no argument", 501, "5.5.4")
        self._reset()
        return Reply(250, "2.0.0", "Reset")

    def do_VRFY(self, argument: str) -> Reply | None:
        """Promise nothing: RFC 5321 4.1.1.6, 7.3."""
        self._require(argument, "Syntax is VRFY name", 501, "5.5.4")
        return Reply(252, "2.0.0", "Cannot verify, but will try to deliver")

    def do_EXPN(self, argument: str) -> Reply | None:
        """Refuse: RFC 5321 4.1.1.7, 7.3."""
        raise PermanentFailure("There are no mailing lists", 502, "5.5.1")

    def do_HELP(self, argument: str) -> Reply | None:
        """List the verbs: RFC 5321 4.1.1.8."""
        return Reply(214, "2.0.0", "Verbs: " + " ".join(self.VERBS))

    def do_NOOP(self, argument: str) -> Reply | None:
        """Do nothing: RFC 5321 4.1.1.9."""
        return Reply(250, "2.0.0", "Here")

    def do_QUIT(self, argument: str) -> Reply | None:
        """End the session: RFC 5321 4.1.1.10."""
        return Reply(221, "2.0.0", "Goodbye")

    VERBS = {
        "EHLO": "do_EHLO", "HELO": "do_HELO", "STARTTLS": "do_STARTTLS", "AUTH": "do_AUTH",
        "MAIL": "do_MAIL", "RCPT": "do_RCPT", "DATA": "do_DATA", "BDAT": "do_BDAT",
        "RSET": "do_RSET", "VRFY": "do_VRFY", "EXPN": "do_EXPN", "HELP": "do_HELP",
        "NOOP": "do_NOOP", "QUIT": "do_QUIT",
    }

    # What the verbs share

    def _require(self, condition: T | None, text: str, code: int = 503,
                 enhanced: str = "5.5.1") -> T:
        """Return `condition` if it holds, or refuse: by 503 out of order, RFC 5321 4.1.4."""
        if not condition:
            raise PermanentFailure(text, code, enhanced)
        return condition

    def _reset(self) -> None:
        """Give up the transaction. Where there is none, that is small talk, which holds no slot."""
        if self.mail:
            self.mail, self._last_use = None, _now()

    def _too_big(self) -> Reply:
        return Reply(552, "5.3.4", "Mail exceeds %d bytes" % self._settings.max_size)

    def _ask_checks(self, address: str, mail: Mail, detail: str) -> None:
        """Refuse an address for want of SMTPUTF8, or as `check` says."""
        if not (address.isascii() or mail.smtputf8):
            raise PermanentFailure("Address needs SMTPUTF8", 553, "5.6.7")
        try:
            for check in self._settings.checks:
                _understand_result(check(address, mail))
        except _Failure as failure:
            _refuse(failure._reply(self._log.info, "Address refused", (553, detail)))
        except BaseException:
            self._log.error("check raised", exc_info=True)
            _refuse(Reply(451, "4.3.0", "Internal error"))

    def _start_tls(self) -> None:
        """Begin the session afresh within TLS: RFC 3207 4.2."""
        try:
            self._log.info("%s", self._wire.start_tls(self._settings.tls))
        except (OSError, ValueError, _Ended) as error:      # ssl.SSLError is an OSError
            # Without a 421, which in plain text would not be understood.
            raise _Ended(None, "TLS handshake failed: %s" % error) from None
        self._reset()
        self.tls, self.helo, self._protocol = True, "", ""

    # Authentication

    def ask(self, challenge: bytes) -> bytes:
        """Send a challenge of AUTH and return the response, both without their base64."""
        import base64
        self.send(Reply(334, "", base64.b64encode(challenge).decode()))
        line = self.read_line()
        self._require(len(line) <= MAX_AUTH_LINE, "Line too long", 500, "5.5.2")
        self._log.debug("C: (hidden)")
        return _decode_response(line.decode("latin-1"))

    def _authenticate(self, user: str, password: str) -> Reply:
        slots = self._wire.slots
        self.flush()
        started = _now()
        accepted, is_late = False, True
        reply = Reply(535, "5.7.8", "Wrong user name or password")
        try:
            # Nobody has an empty one (RFC 4616 section 2), but a directory may take it for a login
            # without a name: RFC 4513 5.1.2. True, or a database's 1; a coroutine, or an object
            # with the result in it, is neither.
            accepted = bool(user and password) and self._settings.authenticate(
                user, password) in (True,)
        except _Failure as failure:
            is_late = isinstance(failure, PermanentFailure)
            reply = failure._reply(self._log.info, "Not accepted", (535, "7.8"), (454, "7.0"))
        except BaseException as error:
            # Its text might hold the password, and so might a traceback.
            self._log.error("authenticate raised %s", type(error).__name__)
            reply = Reply(454, "4.7.0", "Cannot authenticate now")
        # Remembered before the delay, so that no guess made meanwhile is answered sooner.
        if is_late and not accepted:
            slots.late_until = max(slots.late_until, _now() + AUTH_MEMORY)
        if is_late and _now() < slots.late_until:
            slots.sleep(AUTH_DELAY)
        self._last_use += _now() - started      # by which the client has not been idle
        if accepted:
            self.user = user
            self._log.info("authenticated as %s", _shown(user))
            return Reply(235, "2.7.0", "Authenticated")
        if reply.code >= 500:
            self._log.info("authentication failed%s", self._client_field)
            self._errors += 1
        _refuse(reply)

    # Mail data

    def _read_mail_data(self, mail: Mail) -> Reply | None:
        """Read the mail data to its end, whatever goes wrong; return the reply if anything did."""
        data = _MailData(b"\r\n" if self._line.endswith(b"\r\n") else b"\n", self._bare_lf)
        head = b""
        if self._settings.received:
            head = _received_line(mail, self.hostname, self._protocol)
        problem = self._store(mail, head, (head,), data)
        start = _now()
        try:
            while not data.ended:
                pieces = data.feed(self._wire.read_piece(start, data.size))
                problem = problem or self._store(mail, head, pieces, data)
                del pieces      # no more than one piece is held while the next comes in
        except _Ended as end:
            # The client may think that it has ended the data, if only by other line ends.
            if data.tail.endswith((b"\n.\n", b"\n.\r\n")) and not self._wire.slots.stopping:
                hint = "; mail data has to end in CR LF . CR LF"
                end.reply = end.reply and Reply(421, "4.4.2", end.reply.lines[0] + hint)
                end.reason += hint
            raise
        self._wire.input = data.rest
        return problem

    def _store(self, mail: Mail, head: bytes, pieces: Iterable[bytes],
               data: _MailData) -> Reply | None:
        """Keep these lines; return the reply where they are too many, loop, or find no room."""
        try:
            problem = self._too_big() if 0 < self._settings.max_size < data.size else None
            for lines in pieces if not problem else ():
                if head and mail.size == len(head):
                    if lines[:1] in (b" ", b"\t"):
                        lines = b"\n" + lines       # or else that line would continue the field
                    elif lines.startswith((b"From ", b">From ")):
                        # A line of mbox, which behind a field would end the header.
                        lines = b"X-Mailbox-Line: " + lines
                mail._write(lines)
            if data.ended and head and not problem:
                # RFC 5321 6.3: what mails are piped to sends them back here. Each time takes a
                # session, which waits for the next: the limit leaves room for others.
                header = mail.file.read(_CHUNK).partition(b"\n\n")[0]
                if header.count(b" (msmtpd) with ") > MAX_HOPS:     # as _received_line has it
                    problem = Reply(554, "5.4.6", "Mail loop: it has been here %d times" % MAX_HOPS)
        except (OSError, MemoryError) as error:
            self._log.error("cannot spool: %s", _why(error))
            problem = Reply(452, "4.3.1", "No room for the mail now")
        if problem:
            self._log.info("refused the mail data: %s", problem._brief())
            _drop(mail._file)
        return problem

    def _deliver(self, mail: Mail) -> Reply:
        """Call `deliver`; return the reply for what it returned or raised."""
        try:
            reply = _understand_result(self._settings.deliver(mail))
            return reply or Reply(250, "2.0.0", "Delivered")
        except _Failure as failure:
            # What a command says is an error; what a caller's function raises was meant so.
            log = self._log.error if isinstance(self._settings.deliver, Command) else self._log.info
            return failure._reply(log, "Delivery failed", (554, "3.0"), (451, "3.0"))
        except BaseException:
            self._log.error("deliver raised", exc_info=True)
            return Reply(451, "4.3.0", "Internal error")

    # What the log is told

    def _log_mail(self, mail: Mail, reply: Reply, seconds: float) -> None:
        """Log in one line what became of the mail."""
        if not self._log.informing:
            return
        status = {2: "sent", 4: "deferred"}.get(reply.code // 100, "failed")
        outcome = " %s" % mail.outcome if mail.outcome else ""
        # A `deliver` may have changed them to what is no text.
        sender, *recipients = ("<%s>" % _shown(str(address)).replace(">", "\\x3e")
                               for address in (mail.sender, *mail.recipients))
        user = "" if self.user is None else " user=" + _shown(self.user)
        self._log.info("mail from=%s to=%s size=%d status=%s%s seconds=%.3f%s%s", sender,
                       ",".join(recipients), mail.size, status, outcome, seconds,
                       self._client_field, user)


_OPEN_VERBS = frozenset(Session.VERBS) - {"AUTH", "STARTTLS"}      # that hold no secret
_PROTOCOLS = {"EHLO": "ESMTP", "HELO": "SMTP"}      # by the greeting: RFC 3848


# ---- Authentication ---------------------------------------------------------------------------

def _decode_response(text: str) -> bytes:
    """A response of AUTH without its base64; "=" is an empty one (RFC 4954 section 4).

    White space around it and a "=" that is missing at its end do no harm. Raises PermanentFailure
    for what is wrong with it, or because the client cancels.
    """
    import base64
    text = text.strip(" \t\r\n")
    if text == "*":
        raise PermanentFailure("Cancelled", 501, "5.5.2")
    text = text.rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:      # binascii.Error is one
        raise PermanentFailure("Bad base64", 501, "5.5.2") from None


# A mechanism asks the client for what `initial`, a response that came with AUTH, has not said, and
# returns user name and password, or raises PermanentFailure.

def _plain(ask: Ask, initial: bytes | None) -> tuple[str, str]:
    """PLAIN: RFC 4616 section 2. For whom the user wants to act is ignored."""
    fields = (ask(b"") if initial is None else initial).split(b"\0")
    if len(fields) != 3:
        raise PermanentFailure("Bad response", 501, "5.5.2")
    return _decode_text(fields[1]), _decode_text(fields[2])


def _login(ask: Ask, initial: bytes | None) -> tuple[str, str]:
    """LOGIN, which asks for each by itself; some clients compare the prompts."""
    user = ask(b"Username:") if initial is None else initial
    return _plain(ask, b"\0%b\0%b" % (user, ask(b"Password:")))


_MECHANISMS = {"PLAIN": _plain, "LOGIN": _login}


def one_user(user: str, password: str) -> Authenticate:
    """An `authenticate` that accepts one user, comparing in constant time."""
    import hmac
    right_user, right_password = (text.encode("utf-8", "surrogateescape")
                                  for text in (user, password))

    def authenticate(user: str, password: str) -> bool:
        return (hmac.compare_digest(password.encode(), right_password)
                & hmac.compare_digest(user.encode(), right_user))
    return authenticate


# ---- Delivery: one command, run for each mail -------------------------------------------------

# By the outcome; any other is 451 4.3.0: from 129 on, as 124, a status is that of a shell, ssh or
# timeout(1) whose command was killed. See sysexits.h.
_EXIT_REPLIES = {
    **dict.fromkeys(range(129), (554, "5.3.0")),
    65: (554, "5.6.0"),     # EX_DATAERR
    67: (554, "5.1.1"),     # EX_NOUSER
    68: (451, "4.3.0"),     # EX_NOHOST
    69: (451, "4.3.0"),     # EX_UNAVAILABLE
    71: (451, "4.3.0"),     # EX_OSERR
    75: (451, "4.3.0"),     # EX_TEMPFAIL
    77: (554, "5.7.0"),     # EX_NOPERM
    78: (554, "5.3.5"),     # EX_CONFIG
    124: (451, "4.3.0"),    # timed out
    126: (451, "4.3.5"),    # not executable
    127: (451, "4.3.5"),    # not found
}

# Programs that hand their arguments to a shell, or read them as one would.
_SHELLS = frozenset("""
    adb ash autossh bash busybox clush csh dash dbclient doas dsh elvish eval expect fish flock
    hush ksh lksh make mksh mosh msmtp-enqueue.sh msmtp-queue msmtpq msmtpq-ng nu oksh osh parallel
    pdksh pdsh plink posh pssh pwsh rbash rc remsh rksh rlogin rsh rsync runuser rzsh sash scp
    screen script sg sh slogin ssh su sudo systemd-run tclsh tcsh tmux toybox watch xargs xonsh
    yash ysh zsh
""".split())

# What a shell takes literally, and what is special to it anywhere else.
_QUOTED = r"""'[^']*'|"(?:[^"\\$`]|\\["\\])*"|\\."""
_SPECIAL = frozenset("|&;<>()$`\\\"'*?[]{}~#!^")


class Command:
    """The `deliver` that pipes each mail to a command line of /bin/sh.

    text: the command line. The first ``%F`` in it becomes the sender (MAILER-DAEMON for <>), and
    the recipients are appended as arguments. timeout: seconds that it may take, DELIVERY_TIMEOUT
    if None. stdout: a descriptor for its standard output, None for the caller's own. warnings:
    what may be wrong with it. Raises ValueError for what cannot work, and on Windows.

    If the words need no shell, the program is started directly, otherwise by ``sh -c``, whose text
    never holds the recipients. Its environment is that of the moment when this is made, and
    MSMTPD_USER, where a user has authenticated. Only its exit status decides: 0 is success; 68, 69,
    71, 75, 124, 126, 127, from 129 on, and a signal are temporary failures, all others permanent
    ones. After `timeout` its process group gets SIGTERM, KILL_DELAY seconds later SIGKILL.
    """

    def __init__(self, text: str = "msmtp -f %F --", *, timeout: float | None = None,
                 stdout: int | None = None) -> None:
        if os.name != "posix":
            raise ValueError("command needs a POSIX system; give Server a function instead")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise ValueError("this process ignores SIGCHLD, and so loses every exit status")
        if timeout is not None and not timeout > 0:
            raise ValueError("delivery_timeout has to be more than 0")
        if stdout == 0:
            raise ValueError("stdout cannot be descriptor 0, where the command reads the mail")
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                raise ValueError("command needs descriptor %d of this process, which is closed; "
                                 "open %s in its place" % (number, os.devnull)) from None
        self.text = text
        self.warnings: list[str] = []
        self._timeout = DELIVERY_TIMEOUT if timeout is None else timeout
        self._stdout = 1 if stdout is None else stdout
        self._runs: set[_Run] = set()
        self._unended: set[_Run] = set()        # those that nothing could end
        self._program, words = self._read_text()
        self._reparser = _find_reparser(words)
        self._words = [os.fsencode(word) for word in words]
        # Which of them holds %F, the place of the sender, if any does.
        self._place = next((n for n, word in enumerate(words) if "%F" in word), 0)
        # Name by name, since another thread may change it meanwhile.
        environment = [b"%b=%b" % (name, os.environb.get(name, b""))
                       for name in list(os.environb) if name not in (b"", b"MSMTPD_USER")]
        # For recipients, as MAX_RECIPIENT_BYTES counts them: the kernel bounds arguments and
        # environment together, often by a quarter of the stack.
        used = sum(len(word) + 9 for word in (
            os.fsencode(self._program), *self._words, *environment))
        spare = MAX_LINE + MAX_AUTH_LINE + 4096     # for the sender, the user, the kernel's own
        self._room = os.sysconf("SC_ARG_MAX") - used - spare
        try:
            self._spawn = _glibc_spawn(environment)
        except (ImportError, AttributeError, OSError, MemoryError):     # no ctypes, no such glibc
            self._spawn = functools.partial(_popen, environment)

    def check(self, address: str, mail: object = None) -> None:
        """Raise PermanentFailure if `address` could be read as an option, program, file or code."""
        like_a_file = address.startswith("+") or "/" in address
        if (address.startswith(("-", "|")) or address.endswith("|")
                or like_a_file and not re.search('@[^"@]*$', address)):     # it has no domain
            raise PermanentFailure("Address not safe for a command", 553)
        if self._reparser and not _is_inert(address):
            raise PermanentFailure("Address not safe here: " + self._reparser, 553)

    def __call__(self, mail: Mail) -> None:
        """Run the command on `mail`. Raises TemporaryFailure and PermanentFailure."""
        for address in (mail.sender, *mail.recipients):
            self.check(address)
        self._unended.difference_update([run for run in list(self._unended) if run.reap()])
        if len(self._unended) >= MAX_UNENDED:
            raise TemporaryFailure("Earlier commands do not end", 451, "4.3.0",
                                   ["%d earlier commands do not end" % len(self._unended)])
        deadline = _now() + self._timeout
        run = self._start(mail)
        self._runs.add(run)
        try:
            outcome = run.finish(deadline)
        finally:
            self._runs.discard(run)
            if not run.reap():
                self._unended.add(run)
        mail.outcome = "exit=%s" % outcome
        if outcome != 0:
            errors = run.errors.decode("utf-8", "replace")
            lines = [line.strip() for line in errors.splitlines() if line.strip()]
            said = _plain_ascii("; ".join(lines))[:MAX_ERROR_TEXT]
            why = "Command failed (exit %s)" % outcome + (said and ": " + said)
            code, enhanced = _EXIT_REPLIES.get(outcome, (451, "4.3.0"))  # type: ignore[arg-type]
            _refuse(Reply(code, enhanced, why), lines)

    def _read_text(self) -> tuple[str, list[str]]:
        """Return the program to start, the shell where that has to read the text, and its words."""
        text = self.text
        if not text.strip():
            raise ValueError("command is empty")
        if not {"\r", "\n", "\0"}.isdisjoint(text):
            raise ValueError("command holds a CR, LF or NUL; it has to be one line")
        bare = re.sub(_QUOTED, "x", text) if _SPECIAL.intersection(text) else text
        if bare.rstrip()[-1] in ";&|<>\\":
            raise ValueError("command ends in %s, which would take a recipient for a "
                             "command or a file; end it in --" % bare.rstrip()[-1])
        if "#" in bare and re.search(r"(?:^|[\s;&|()])#", bare):
            self.warnings.append("the command has a comment, which swallows the recipients")
        words: list[str] = []
        program = problem = ""
        if not _SPECIAL.intersection(bare) and bare.replace("\t", " ").isprintable():
            words = text.split()
            if bare != text:
                import shlex
                words = shlex.split(text)
            program, problem = _find_program(words[0])
        if not program:
            problem = self._ask_shell(words)
            program, words = "/bin/sh", ["sh", "-c", text + ' "$@"', "msmtpd"]
        if problem:
            self.warnings.append(problem + "; each mail will be deferred until that is mended")
        return program, words

    def _ask_shell(self, words: list[str]) -> str:
        """What is wrong with the command's program, or "".

        words: those of a command that needs no shell. Raises ValueError if a shell cannot read it.
        """
        import subprocess
        word = re.match(r"(?:\w+=\S* +|exec +)*(['\"]?)([\w./+-]+)\1(?:\s|$)", self.text.strip())
        name = word.group(2) if word else words[0] if words else ""
        problem = name and _find_program(name)[1]
        try:
            done = subprocess.run(
                ("/bin/sh", "-c", '/bin/sh -n -c "$1" || exit 9; command -v -- "$2"', "sh",
                 self.text + ' "$@"', name), stdin=subprocess.DEVNULL, capture_output=True,
                encoding="utf-8", errors="replace")
            if done.returncode == 9:
                raise ValueError("command cannot be read by the shell: " + done.stderr.strip())
            # The shell knows its builtins, too, but takes any file for a program.
            problem = problem if "/" in name or done.returncode else ""
        except OSError as error:
            if not words:
                raise ValueError("command needs /bin/sh: %s" % error.strerror) from None
        return problem

    def _start(self, mail: Mail) -> _Run:
        """Start the command with the mail as its standard input. Raises TemporaryFailure."""
        words = self._words + [recipient.encode() for recipient in mail.recipients]
        # Addresses are UTF-8 whatever the locale: in some, letters hold bytes of shell operators.
        sender = (mail.sender or "MAILER-DAEMON").encode()
        words[self._place] = words[self._place].replace(b"%F", sender, 1)
        user = [] if mail.user is None else [b"MSMTPD_USER=" + mail.user.encode()]
        opened: list[int] = []
        try:
            opened.append(_open_input(mail))
            opened += os.pipe()
            if min(opened) < 3:     # one copy could overwrite another's source
                raise OSError(errno.EBADF, "one of descriptors 0 to 2 of this process was closed")
            descriptors = opened[0], self._stdout, opened[2]
            try:
                pid = self._spawn(self._program, words, user, descriptors)
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                # A script without #! is run by the shell, as by execvp(3).
                words[:1] = b"sh", os.fsencode(self._program)
                pid = self._spawn("/bin/sh", words, user, descriptors)
            return _Run(pid, opened.pop(1))
        except (OSError, ValueError, MemoryError) as error:
            _, problem = _find_program(self._program)
            why = problem or _why(error)
            missing = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
            raise TemporaryFailure("Cannot start the command: " + why, 451,
                                   "4.3.5" if missing else "4.3.0", [why]) from None
        finally:
            for descriptor in opened:
                _close(descriptor)


def _find_reparser(words: list[str]) -> str:
    """What might read a sender or recipient as code; "" if nothing in the command might."""
    for word in words:
        before, found, after = word.partition("%F")
        if found and (after or before and not before.startswith("-")):
            return "%F is inside of a word of the command"
        for part in word.split():
            # Also bash5.2, and by their first letters bash-static, zsh5-static and sudo.ws.
            name = part.replace("=", "/").split("/")[-1].rstrip("0123456789.-")
            if not _SHELLS.isdisjoint((name, re.split("[^a-z]", name)[0])):
                return "the command needs %s, which may read it as code" % name
    return ""


def _find_program(name: str) -> tuple[str, str]:
    """The path of a program, "" where none can be executed, and what is wrong with it, or "".

    As shutil.which has it, whose import would cost inetd users some milliseconds.
    """
    places = [""] if "/" in name else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for path in (os.path.join(place, name) for place in places):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                match = re.match(rb"#![ \t]*([^ \t\n]+)", file.readline(256))
                if match and not os.path.exists(match.group(1)):
                    return path, "%s names an interpreter that is missing: %s" % (
                        path, _shown(match.group(1).decode("utf-8", "replace")))
            return path, ""
    return "", "cannot find or execute the program " + name


class _Run:
    """One run of the command, in a session, and so a process group, of its own.

    It may deliver whatever happens here: so an error of ours must neither pass for one of its own
    nor end the watch over it. errors: the head of its standard error.
    """

    def __init__(self, pid: int, stderr: int) -> None:
        self.errors = b""
        self._status: int | str | None = None       # None until it is reaped
        self._pid, self._stderr, self._pidfd = pid, stderr, -1
        try:        # Linux with Python 3.9 or newer, unless forbidden
            self._pidfd = os.pidfd_open(pid)
        except (AttributeError, OSError, MemoryError):
            pass
        # Mostly it ends at once, of which a pidfd wakes but once.
        self._watched = {stderr if self._pidfd < 0 else self._pidfd}

    def finish(self, deadline: float) -> int | str:
        """Wait for the command to end; after `deadline`, make its whole group end.

        Of what else is in the group, only those that hold standard error are waited for, since a
        signal reaches zombies, too. Returns its exit status, or "signal N", "timeout" or "lost".
        """
        try:
            if self._pidfd >= 0:
                self._look(0.01)
            self._watched.add(self._stderr)
            self._wait(deadline)
            outcome = self._status
            if outcome is None:
                self.signal(signal.SIGTERM)
                self._wait(_now() + KILL_DELAY, whole_group=True)
                self.signal(signal.SIGKILL)
                self._wait(_now() + KILL_DELAY)     # in vain: another user's, or in the kernel
                outcome = "timeout"
            if outcome != 0:
                self._wait(0.0, whole_group=True)   # no longer, but for its last words
            return outcome
        except BaseException:
            self.signal(signal.SIGKILL)
            raise
        finally:
            _close(self._stderr)
            _close(self._pidfd)

    def _wait(self, until: float, whole_group: bool = False) -> None:
        """Wait for its end, or for all who hold its standard error."""
        left, pause = 1.0, _SHORT_PAUSE
        while left > 0 and (self._status is None or whole_group and self._watched):
            left = until - _now()
            # No longer than poll(2) can; where there is no pidfd, in growing turns.
            seconds = max(0.0, min(left, 3600.0 if self._pidfd in self._watched else pause))
            pause = _SHORT_PAUSE if self._look(seconds) else min(2 * pause, 0.05)

    def _look(self, seconds: float) -> bool:
        """Wait until one of what is watched is ready, and take what standard error holds, and the
        status; return whether standard error has ended, so that the end of the command is near.
        """
        at_end = False
        try:
            if not self._watched:       # as poll(2) knows milliseconds only
                time.sleep(seconds)
            elif self._stderr in _ready(self._watched, (), seconds):
                data = os.read(self._stderr, _CHUNK)
                self.errors += data[:MAX_ERROR_OUTPUT - len(self.errors)]
                at_end = not data
        except (OSError, MemoryError):
            time.sleep(min(seconds, 0.01))
        if at_end:
            self._watched.remove(self._stderr)
        if self.reap():
            self._watched.discard(self._pidfd)
        return at_end

    def signal(self, number: int) -> None:
        """Send a signal to the whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, number)

    def reap(self) -> bool:
        """Take the status of the command, if it has ended; return whether it has."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    self._status = ("signal %d" % os.WTERMSIG(status) if os.WIFSIGNALED(status)
                                    else os.WEXITSTATUS(status))
            except ChildProcessError:   # another thread waits for all children, or SIGCHLD is
                self._status = "lost"   # ignored
        return self._status is not None


def _close(descriptor: int) -> None:
    """Close a descriptor; an error of that changes nothing."""
    try:        # contextlib.suppress would take ten times as long, five times a mail
        os.close(descriptor)
    except OSError:
        pass


def _open_input(mail: Mail) -> int:
    """A descriptor for the command to read the mail from: a pipe if that can hold all of it.

    Raises TemporaryFailure if it cannot, and there is no room for it elsewhere.
    """
    if isinstance(mail._file, io.BytesIO):
        data = mail.data
        reader, writer = os.pipe()
        try:
            if len(data) > 4096:        # the least that a pipe takes at once anywhere
                os.set_blocking(writer, False)
            if len(data) > 65536:       # what it takes on Linux, unless asked for more
                import fcntl
                fcntl.fcntl(writer, getattr(fcntl, "F_SETPIPE_SZ", 1031), len(data))
            if os.write(writer, data) == len(data):
                return reader
        except OSError:     # BlockingIOError is one
            pass
        finally:
            _close(writer)
        _close(reader)
    try:
        mail._ensure_descriptor()
    except OSError as error:
        raise TemporaryFailure("No room for the mail now", 452, "4.3.1", [_why(error)]) from None
    return os.dup(mail.file.fileno())


def _popen(environment: list[bytes], program: str, arguments: list[bytes],
           variables: list[bytes], descriptors: tuple[int, int, int]) -> int:
    """Start a program, with further variables and descriptors to be 0 to 2; return its id."""
    import subprocess
    process = subprocess.Popen(
        arguments, -1, program, *descriptors, start_new_session=True,
        env=dict(variable.split(b"=", 1) for variable in environment + variables))
    process.returncode = 0      # so that subprocess leaves it to us
    return process.pid


def _glibc_spawn(environment: list[bytes]) -> Callable[..., int]:
    """As _popen with this environment, by posix_spawn(3) of glibc 2.34 or newer, or else raises.

    Other threads run meanwhile, unlike under subprocess: half as many mails again for 8 clients.
    """
    import ctypes
    glibc, posix_spawn = ctypes.PyDLL("libc.so.6"), ctypes.CDLL("libc.so.6").posix_spawn
    add_close_from = glibc.posix_spawn_file_actions_addclosefrom_np
    block = ctypes.c_long * 128         # larger than each of glibc's structures

    def strings(texts: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
        if 0 in b"".join(texts):
            raise ValueError("NUL in an argument")      # it would end there
        return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)

    attributes, all_signals = block(), block()
    glibc.sigfillset(all_signals)
    glibc.posix_spawnattr_init(attributes)      # with zeros: an empty mask of signals among them
    glibc.posix_spawnattr_setflags(attributes, 0x04 | 0x08 | 0x80)  # SETSIGDEF, SETSIGMASK, SETSID
    glibc.posix_spawnattr_setsigdefault(attributes, all_signals)
    usual = strings(environment)

    def spawn(program: str, arguments: list[bytes], variables: list[bytes],
              descriptors: tuple[int, int, int]) -> int:
        actions, pid, words = block(), ctypes.c_int(), strings(arguments)
        variables_of_run = strings(environment + variables) if variables else usual
        error = glibc.posix_spawn_file_actions_init(actions)
        for number, descriptor in enumerate(descriptors):
            error = error or glibc.posix_spawn_file_actions_adddup2(actions, descriptor, number)
        error = error or add_close_from(actions, 3) or posix_spawn(
            ctypes.byref(pid), os.fsencode(program), actions, attributes, words, variables_of_run)
        glibc.posix_spawn_file_actions_destroy(actions)
        if error:
            raise OSError(error, os.strerror(error), program)
        return pid.value
    return spawn


def smtpd_handler(process_message: Callable[..., str | None], *,
                  decode_data: bool = False) -> Deliver:
    """The `deliver` that calls a `process_message` written for the removed module smtpd.

    It is called as ``process_message(peer, mailfrom, rcpttos, data, mail_options=[...],
    rcpt_options=[...])`` with the data as bytes, its lines joined by LF; with `decode_data`, as
    there, as str and without options. The client is told the reply that it returns, such as
    "550 5.1.1 No such user", and that the mail is delivered if it returns None.
    """
    def deliver(mail: Mail) -> str | None:
        data, sender, peer = mail.data[:-1], mail.sender or "<>", (mail.peer.host, mail.peer.port)
        if decode_data:
            reply = process_message(peer, sender, mail.recipients, data.decode())
        else:
            reply = process_message(peer, sender, mail.recipients, data,
                                    mail_options=mail.mail_options, rcpt_options=mail.rcpt_options)
        # Of several lines, such as "550-No" and "550 Never", all but the first drop the code.
        text = re.sub(r"\r?\n(?:[245][0-9]{2}[- ])?", " ", (reply or "").rstrip())
        code, _, text = text.replace("-", " ", 1 if text[3:4] == "-" else 0).partition(" ")
        if re.fullmatch("[45][0-9]{2}", code):
            failure = TemporaryFailure if code < "500" else PermanentFailure
            raise failure(text.lstrip(), int(code))
        return code + " " + text
    return deliver


# ---- Serving ----------------------------------------------------------------------------------

class Server:
    """An SMTP server on one or more sockets, with a thread for each session.

    deliver(mail): called with each Mail, from the thread of its session, so from up to
    `max_sessions` at a time. The client hears 250 when it returns, in its words if it returns a str
    such as "250 Stored as 7", and what a TemporaryFailure or PermanentFailure says when it raises
    one; any other exception is logged and answered 451. Most clients give up after ten minutes.
    host: an IP address, or a sequence of them; "localhost" is 127.0.0.1. port: 0 for a free one.
    sockets: listening sockets to use instead of these; stop() closes them.
    authenticate(user, password): both str and not empty; True lets the client send. All else is
    answered AUTH_DELAY seconds late, and so is any AUTH for AUTH_MEMORY seconds after it (tests
    may set msmtpd.AUTH_DELAY to 0). It may refuse in its own words by raising either failure; any
    other exception is answered 454. If None, nobody has to authenticate, or can.
    auth_required: whether who has not authenticated is refused where `authenticate` is given.
    tls: an ssl.SSLContext for STARTTLS, or with starttls=False for TLS from the first byte.
    check(address, mail): called for the sender, when `mail` has no recipients, and for each
    recipient, then the last one of `mail`; may raise either failure. A Command's own comes first.
    session: the class of the sessions. received: whether mails get a Received line. max_size:
    bytes of a mail, 0 for any number. max_sessions: served at a time. timeout: seconds that a
    client may be silent. log: a logging.Logger, that named "msmtpd" if None.

    Once started, `host` and `port` are those of the first socket, `addresses` those of all.
    Raises ValueError for arguments that make no sense.
    """

    def __init__(self, deliver: Deliver, host: str | Sequence[str] = "127.0.0.1",
                 port: int = 0, *, authenticate: Authenticate | None = None,
                 auth_required: bool = True, tls: ssl.SSLContext | None = None,
                 starttls: bool = True, check: Check | None = None,
                 session: type[Session] = Session, received: bool = False,
                 max_size: int | None = None, max_sessions: int | None = None,
                 timeout: float | None = None, sockets: Sequence[socket.socket] = (),
                 log: Logger | None = None) -> None:
        host = "127.0.0.1" if host == "localhost" else host
        self._hosts = [host] if isinstance(host, str) else list(dict.fromkeys(host or ()))
        self._max_sessions = MAX_SESSIONS if max_sessions is None else max_sessions
        max_size = MAX_SIZE if max_size is None else max_size
        timeout = TIMEOUT if timeout is None else timeout
        for makes_sense, wanted in (
                (callable(deliver) and all(each is None or callable(each)
                                           for each in (check, authenticate)),
                 "deliver, check and authenticate have to be functions"),
                (self._hosts and all(isinstance(address, str) for address in self._hosts),
                 "host has to be an IP address, or a sequence of them; \"::\" is any"),
                (port in range(65536), "port has to be a number from 0 to 65535"),
                (starttls or tls, "starttls=False needs tls"),
                (max_size >= 0, "max_size has to be 0 or more"),
                (self._max_sessions > 0, "max_sessions has to be 1 or more"),
                (timeout > 0, "timeout has to be more than 0")):
            if not makes_sense:
                raise ValueError(wanted)
        self.host, self.port, self._port = self._hosts[0], port, port
        self.addresses: list[Peer] = []
        checks: tuple[Check, ...] = () if check is None else (check,)
        room = float("inf")
        if isinstance(deliver, Command):        # so that MAIL and RCPT already refuse
            checks, room = (deliver.check, *checks), deliver._room
        auth_required = auth_required and authenticate is not None
        self._settings = _Settings(deliver, checks, room, authenticate, auth_required, None,
                                   starttls, received, max_size, timeout)
        if tls is not None:
            self.tls = tls
        self._session, self._sockets, self._log = session, sockets, _library_log(log)
        self._starting, self._numbers = threading.Lock(), itertools.count(1)
        self._service: _Service | None = None       # while it is started

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context of sessions that begin from now on. Another one may be set at any time."""
        context: ssl.SSLContext | None = self._settings.tls
        return context

    @tls.setter
    def tls(self, context: ssl.SSLContext) -> None:
        import ssl
        # With any other no handshake succeeds, but clients would be told of TLS.
        if not isinstance(context, ssl.SSLContext) or context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("tls has to be a context for servers, such as "
                             "ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), not %r" % (context,))
        self._settings = self._settings._replace(tls=context)

    def __enter__(self) -> Server:
        self._start(anew=False)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, and serve in threads. Raises OSError, and RuntimeError if it has been started."""
        self._start(anew=True)

    def _start(self, anew: bool) -> _Service:
        """Start, unless it has been started, which `anew` forbids; return what serves."""
        with self._starting:
            if self._service and not self._service.stopping:
                if anew:
                    raise RuntimeError("the server has been started already")
                return self._service
            sockets = self._sockets or _listen(self._hosts, self._port)

            def serve(client: socket.socket, address: object) -> None:
                self._new_session(_taking_turns(client), service, _peer_of(address))._run()
            service = _Service(sockets, self._max_sessions, self._log, serve)
            try:
                self.addresses = [_peer_of(listener.getsockname()) for listener in sockets]
                service.start()
                self._service = service
            except BaseException:
                service.stop(0.0, STOP_PATIENCE)
                service.join()
                raise
            if self.addresses[0].port is not None:
                self.host, self.port = self.addresses[0].host, self.addresses[0].port
            return service

    def stop(self, grace: float = 1.0) -> None:
        """Stop listening, end the sessions, and wait for that; never hangs.

        Idle sessions end at once, others have `grace` seconds for their mail data. A `deliver` that
        goes on for STOP_PATIENCE longer is logged and left behind, one that calls this not awaited.
        """
        service = self._service     # by the end, a `deliver` may have started another
        if service:
            service.stop(grace, STOP_PATIENCE)
            self._join(service)

    def serve_forever(self) -> None:
        """Serve, starting if need be, until stop() elsewhere; after KeyboardInterrupt call that."""
        service = self._service or self._start(anew=False)
        while not service.wait():
            pass
        self._join(service)

    def _join(self, service: _Service) -> None:
        """Wait for the end of this service, which has been told to stop."""
        if service.join() and self._service is service:
            self._service = None

    def _new_session(self, connection: Connection, slots: _Slots, peer: Peer) -> Session:
        number = next(self._numbers)
        return self._session(_Wire(connection, slots, self._settings.timeout), self._settings,
                             self._log.of_session(number), number, peer)


class _Service(_Slots):
    """What serves from a start of the server to its stop: the listeners and the threads.

    Each thread accepts a client and serves it: so a client is not handed over to another thread,
    and one for whom no thread is free stays in the listen queue. A client wakes only one of those
    that wait: epoll(7) sees to that on Linux; elsewhere one waits, the others for their turn.
    """

    def __init__(self, sockets: Sequence[socket.socket], number: int, log: _Log,
                 serve: Callable[[socket.socket, object], None]) -> None:
        import socket
        super().__init__()
        self.free = set()                   # of the numbers of threads
        self._number, self._log, self._serve = number, log, serve
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()   # held while they are started
        self._turn = threading.Lock()       # of the one that waits, where there is no epoll
        self._pause = 0.0                   # seconds to wait after the last try, if that failed
        self._turns = itertools.count()     # by which all listeners get theirs, as by epoll(7)
        with contextlib.ExitStack() as opened:
            for listener in sockets:
                opened.enter_context(listener)
                listener.setblocking(False)
                # Inherited by connections, where otherwise a second small reply might wait 40 ms.
                with contextlib.suppress(OSError):      # a Unix socket has no delay
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stop_seen, self._stop_told = socket.socketpair()
            opened.enter_context(self._stop_seen)
            opened.enter_context(self._stop_told)
            self._by_descriptor = {each.fileno(): each for each in (self._stop_seen, *sockets)}
            self._epoll: select.epoll | None = None
            if hasattr(select, "epoll"):        # which eventlet and gevent take away
                self._epoll = opened.enter_context(select.epoll())
                self._epoll.register(self._stop_seen, select.EPOLLIN)
                for listener in sockets:
                    self._epoll.register(listener, select.EPOLLIN | select.EPOLLONESHOT)
            self._opened = opened.pop_all()

    def start(self) -> None:
        """Start as many threads as are to be had. Raises RuntimeError or MemoryError if none is.

        All of them now: once memory has become short, a start may wait for ever.
        """
        spare = bytes(8 << 20)      # for sessions, where threads take all memory; costs none unused
        with self._starting:        # each thread waits until this is done
            for number in range(self._number):
                try:
                    thread = threading.Thread(target=self._work, args=(number,), daemon=True,
                                              name="msmtpd-%d" % (number + 1))
                    thread.start()
                    self._threads.append(thread)
                except (RuntimeError, MemoryError) as error:
                    if number == 0:
                        raise
                    # Keep half of the threads: the commands need processes, which are as scarce.
                    self._number = (number + 1) // 2
                    del self._threads[self._number:], spare
                    self._log.error("no more than %d sessions at a time: %s", self._number,
                                    _why(error))
                    return

    def wait(self) -> bool:
        """Wait for the stop, half a second at most; return whether it has come."""
        # No longer: a signal that the kernel gives to another thread does not end a wait.
        with contextlib.suppress(OSError, ValueError):      # stopped and closed by another thread
            _ready((self._stop_seen.fileno(),), (), 0.0 if self.stopping else min(0.5, TURN))
        return self.stopping

    def stop(self, grace: float, patience: float) -> None:
        """Begin to stop, and return at once, as a signal handler has to.

        A `deliver` that still runs `patience` seconds after `grace` is left behind.
        """
        if os.getpid() == self._pid:
            super().stop(grace, patience)
            with contextlib.suppress(OSError):
                self._stop_told.shutdown(_SHUT_RDWR)
        else:       # a fork, whose parent has the threads and serves on
            self.stopping = True

    def join(self) -> bool:
        """Stop listening and wait for the threads, as long as `stop` allows.

        Returns False, without waiting for their end, if called in one of them.
        """
        if os.getpid() != self._pid:
            self._opened.close()
            return True
        while self.free:        # those who wait for a client will cease to
            time.sleep(0.001)
        self._opened.close()
        if threading.current_thread() in self._threads:
            return False        # stop() in a deliver waits for nobody
        for thread in self._threads:
            while thread.is_alive() and not self.ends(_DELIVERY):
                # In turns, as in `wait`, and since a further stop may bring the end forward.
                thread.join(0.1)
                self.wake()     # once the grace is over, those in mail data, too
        left_behind = sum(thread.is_alive() for thread in self._threads)
        if left_behind:
            self._log.error("left behind: %d sessions, which do not end", left_behind)
        return True

    def _work(self, number: int) -> None:
        """What each thread does: accept a client, serve it, and again, until the service stops."""
        with self._starting:
            if number >= self._number:
                return
        while not self.stopping:
            try:
                self.free.add(number)
                try:
                    accepted = self._accept()
                finally:
                    self.free.discard(number)
                if accepted:
                    with accepted[0]:
                        self._serve(*accepted)
            except BaseException:
                self._log.error("a session ended by an error", exc_info=True)
                time.sleep(0.1)     # in case it recurs at once

    def _accept(self) -> tuple[socket.socket, object] | None:
        """Wait, and return a client and its address; None if it is to be called again."""
        ready: list[socket.socket] = []
        try:
            if self.stopping:       # since this thread is among the free ones, join() waits for it
                return None
            if self._epoll:
                descriptors = [each for each, _ in self._epoll.poll(None, 1)]
            else:
                with self._turn:
                    descriptors = _ready(self._by_descriptor, (), 3600.0)
            ready = [self._by_descriptor[each] for each in descriptors]
            if ready and self._stop_seen not in ready:
                accepted = ready[next(self._turns) % len(ready)].accept()
                self._pause = 0.0
                return accepted
        except (BlockingIOError, ConnectionAbortedError):       # the client has left
            pass
        except Exception as error:      # descriptors or memory are short, which passes
            is_first, self._pause = not self._pause, min(2 * self._pause, 1.0) or 0.1
            if is_first:
                self._log.error("cannot accept, will try again: %s", _why(error))
            time.sleep(self._pause)
        finally:
            self._rearm(ready)
        return None

    def _rearm(self, listeners: list[socket.socket]) -> None:
        """Let epoll(7) tell of the next client; where that failed, the listener would be deaf."""
        for listener in listeners:
            while self._epoll and listener is not self._stop_seen and not self.stopping:
                try:
                    self._epoll.modify(listener, select.EPOLLIN | select.EPOLLONESHOT)
                    break
                except OSError:
                    time.sleep(0.1)


def _library_log(log: Logger | _Log | None) -> _Log:
    """The log of a server that was given this one."""
    if isinstance(log, _Log):
        return log
    import logging
    if log is not None and not hasattr(log, "isEnabledFor"):
        raise ValueError("log has to be a logging.Logger, not %r" % (log,))
    return _Log(logging.getLogger("msmtpd") if log is None else log)


def _peer_of(address: object) -> Peer:
    """The Peer that a socket's address stands for."""
    if not (isinstance(address, tuple) and isinstance(address[0], str)):
        return Peer()       # a Unix or VM socket's
    host = address[0]
    return Peer(host[7:] if host.startswith("::ffff:") and "." in host else host, address[1])


def _listen(hosts: Sequence[str], wanted: int, tries: int = 8) -> list[socket.socket]:
    """Return sockets that listen on each of `hosts`, at port `wanted` or, if 0, one free on all."""
    import socket
    hosts, port = list(hosts), wanted
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        for host in hosts:
            try:
                info = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM,
                                          flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE)[0]
            except (socket.gaierror, UnicodeError):
                raise OSError("%r is not an IP address, such as 127.0.0.1" % host) from None
            # :: serves IPv4, too, unless another of the sockets does.
            both = host == "::" and all(":" in other for other in hosts)
            if both and not socket.has_dualstack_ipv6():        # as on OpenBSD
                both = False
                hosts.append("0.0.0.0")
            try:
                listeners.append(opened.enter_context(socket.create_server(
                    info[4], family=info[0], backlog=LISTEN_QUEUE, dualstack_ipv6=both)))
            except OSError as error:
                if wanted or not (listeners and tries) or error.errno != errno.EADDRINUSE:
                    raise
                return _listen(hosts, 0, tries - 1)     # another port, while these are open
            port = listeners[-1].getsockname()[1]
        opened.pop_all()
    return listeners


def _standard_streams() -> tuple[Connection, Peer]:
    """The client on standard input and output, as inetd has it. Raises _StartError, OSError."""
    import stat
    peer = Peer()
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        import socket
        connection = socket.socket(fileno=os.dup(0))
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _StartError("standard input is a listening socket; in inetd.conf write nowait in "
                              "place of wait, in a systemd socket unit Accept=yes")
        with contextlib.suppress(OSError):      # it has left
            peer = _peer_of(connection.getpeername())
        if os.path.sameopenfile(0, 1):
            return _taking_turns(connection), peer
        connection.close()
    return _Descriptors(0, 1), peer


# ---- Command line -----------------------------------------------------------------------------

class _StartError(Exception):
    """Why the program cannot start, and what to do about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments, sys.argv's if None; return its status; --help exits."""
    if sys.version_info < (3, 8):
        os.write(2, b"msmtpd: needs Python 3.8 or newer\n")
        return 3
    words = list(sys.argv[1:] if argv is None else argv)
    # Known before the options are read: a client is to be told of mistakes in them.
    inetd = any(word.partition("=")[0] in ("--ine", "--inet", "--inetd") for word in words)
    stderr = None
    with contextlib.suppress(OSError):      # it is closed
        stderr = _Outlet(2, "w", closefd=False)
    log = _Log(None, stderr)
    try:
        try:
            _put_in_order(inetd)
        finally:        # whatever is wrong, the log may have been named before that
            import argparse
            options = argparse.Namespace(inetd=inetd, log="none", debug=False)
            try:
                _read_options(words, options)
            except _StartError:
                log = _open_log(options, stderr)
                raise
            log = _open_log(options, stderr)
        return (_run_inetd if inetd else _run_daemon)(options, log)
    except (_StartError, OSError, ImportError, KeyboardInterrupt) as error:
        log.tell(" ".join(str(error).split()) or "interrupted before the start", _ERROR)
    except Exception as error:
        log.error("internal error", exc_info=True)
        log.tell("internal error: " + _why(error), _ERROR)
    if inetd:
        with contextlib.suppress(OSError):      # the client may have left
            os.write(1, b"421 4.3.0 Cannot start; the log, if there is one, says why\r\n")
    return 3


def _put_in_order(inetd: bool) -> None:
    """Mend what commands inherit: PATH, signals, descriptors 0 to 2. Raises OSError."""
    os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:      # exit statuses would be lost
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
            if inetd and descriptor == 2 and any(os.path.sameopenfile(2, n) for n in (0, 1)):
                os.close(2)     # the client, for whom our words are not
                os.fstat(2)
        except OSError:         # closed, so the next file opened would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _read_options(words: Sequence[str], options: argparse.Namespace) -> None:
    """Read `words` into `options`. Raises _StartError for a mistake, with all before it read."""
    parser = _parser()
    try:
        _, unknown = parser.parse_known_args(words, options)
    except _StartError:     # maybe before argparse has set anything
        for end in range(len(words)):
            with contextlib.suppress(_StartError):
                parser.parse_known_args(words[:end], options)
        raise
    if unknown:
        known = ["--" + name.replace("_", "-") for name in vars(options)]
        near: list[str] = []
        with contextlib.suppress(ImportError):      # Debian's python3-minimal has no difflib
            import difflib
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.5)
        hint = ("; did you mean %s?" % near[0] if near else
                "; options begin with --, and a value with spaces needs quotes")
        parser.error("unknown argument %s%s" % (unknown[0], hint))
    if not options.tls_cert_file and (options.tls_key_file or options.tls_starttls == "off"):
        parser.error("TLS needs --tls-cert-file, too")
    users = [user for user, _ in options.auth]
    twice = [user for user in users if users.count(user) > 1]
    if twice:
        parser.error("--auth names a user twice: " + twice[0])


def _parser() -> argparse.ArgumentParser:
    """What reads the options, and writes --help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """Raises _StartError where argparse ends the program by status 2."""

        def error(self, message: str) -> NoReturn:
            raise _StartError(re.sub("^argument ", "", message) + "; see --help")

    parser = Parser(
        prog="msmtpd", usage="%(prog)s [option...]", add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 29, 80),
        description="Hand each mail that comes by SMTP to a command. The first %F in the command "
        "becomes the sender; the recipients are appended as arguments.",
        epilog="Exit status: 0 stopped as asked; 1 stopped by a second signal, or the one session "
        "under inetd went wrong; 3 could not start. The manual is msmtpd.1.")
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("service").add_argument
    add("--inetd", action="store_true", help="serve one client on standard input and output")
    add("--interface", metavar="IP", action="append", type=_text, default=[],
        help="listen on this address (127.0.0.1), repeatable")
    add("--port", metavar="NUMBER", type=int, default=25,
        help="listen on this port (%(default)s), 0 for a free one")
    add("--command", metavar="CMD", type=_text, default="msmtp -f %F --",
        help="pipe mails to this (msmtp -f %%F --)")
    add("--received", choices=("on", "off"), default="on",
        help="begin mails with a Received line (on)")
    add = parser.add_argument_group("log").add_argument
    add("--log", metavar="none|syslog|FILE", type=_text, default="none",
        help="log to this (%(default)s), - is standard error")
    add("--debug", action="store_true", help="log the dialogues, without secrets")
    add = parser.add_argument_group("security").add_argument
    add("--auth", metavar="USER[,CMD]", action="append", type=_auth, default=[],
        help="let only this user send, repeatable; the password is what CMD prints, or in the key "
        "ring, or asked for")
    add("--tls-cert-file", metavar="FILE", type=_text, help="offer TLS with this certificate")
    add("--tls-key-file", metavar="FILE", type=_text, help="its key, if not in the same file")
    add("--tls-starttls", choices=("on", "off"), default="on",
        help="TLS by STARTTLS (on), or from the first byte")
    add = parser.add_argument_group("limits").add_argument
    add("--max-size", metavar="BYTES", type=_size, default=MAX_SIZE,
        help="of a mail (64M), 0 for none; K, M, G may follow")
    add("--max-sessions", metavar="NUMBER", type=int, default=MAX_SESSIONS,
        help="at a time (%(default)s), further clients wait")
    add("--timeout", metavar="SECONDS", type=float, default=TIMEOUT,
        help="for a client's silence (%(default).0f)")
    add("--delivery-timeout", metavar="SECONDS", type=float, default=DELIVERY_TIMEOUT,
        help="for a run of the command (%(default).0f)")
    add = parser.add_argument_group("information").add_argument
    add("--help", action="help", help="print this summary")
    add("--version", action="version", version="msmtpd.py " + __version__,
        help="print the version")


def _mistake(text: str) -> Exception:
    import argparse
    return argparse.ArgumentTypeError(text)


def _text(value: str) -> str:
    if not value:
        raise _mistake("needs a value")
    return value


def _auth(value: str) -> tuple[str, str]:
    user, comma, command = value.partition(",")
    if not user or comma and not command:
        raise _mistake("write USER, or USER,COMMAND")
    return user, command


def _size(value: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", value.upper())
    if not match:
        raise _mistake("%r is not a size, such as 500K, 64M or 0" % value)
    return int(match.group(1)) << 10 * " KMG".index(match.group(2) or " ")


def _open_log(options: argparse.Namespace, stderr: _Outlet | None) -> _Log:
    """The log that the options name. Raises _StartError where it cannot be opened."""
    target = "-" if options.debug and options.log == "none" else options.log
    if target == "none":
        return _Log(None, stderr)
    import logging
    for level in range(logging.DEBUG, logging.CRITICAL + 1, 10):
        logging.addLevelName(level, "info" if level <= logging.INFO else "error")
    logging.raiseExceptions = False     # a log that fails must not fill standard error
    origin = "" if target == "syslog" else "%(asctime)s msmtpd[%(process)d] "
    handler = _log_handler(target)
    handler.setFormatter(logging.Formatter(origin + "%(levelname)s: %(message)s",
                                           "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("msmtpd")    # not the root's, which is others', too
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG if options.debug else logging.INFO)
    return _Log(logger, None if target == "-" or options.inetd else stderr)


def _log_handler(target: str) -> logging.Handler:
    """What writes to the log. Raises _StartError where it cannot be opened."""
    import logging.handlers

    class File(logging.handlers.WatchedFileHandler):
        """Opened anew once it was rotated; may be a pipe that nobody reads."""

        def _open(self) -> _Outlet:     # type: ignore[override]
            return _Outlet(self.baseFilename, "a")

    class Syslog(logging.Handler):
        """The syslog of the C library, which reconnects, and never fails."""

        def emit(self, record: logging.LogRecord) -> None:
            priority = syslog.LOG_ERR if record.levelno >= logging.ERROR else syslog.LOG_INFO
            for line in self.format(record).splitlines():
                syslog.syslog(priority, line.replace("\0", "?"))

    try:
        if target == "-":
            return logging.StreamHandler(_Outlet(2, "w", closefd=False))
        if target != "syslog":
            return File(target)
        import syslog
        syslog.openlog("msmtpd", syslog.LOG_PID, syslog.LOG_MAIL)
        return Syslog()
    except ImportError:
        raise _StartError("this system has no syslog; use --log=FILE") from None
    except OSError as error:
        hint = "; --log=- is standard error" if target.startswith("/dev/") else ""
        raise _StartError("cannot open the log %s: %s%s" % (target, error.strerror, hint)) from None


def _find_password(user: str, command: str, inetd: bool) -> str:
    """The password of --auth, looked up once. Raises _StartError saying what was tried."""
    tried = []
    for output, why_not in _look_up(user, command, inetd):
        password = _decode_text(output.split(b"\n")[0].rstrip(b"\r"))
        if "\0" in password:
            raise _StartError("the password of --auth holds a NUL, which no client can send")
        if password:
            return password
        tried.append(why_not)
    hint = "" if command else (
        "; store one with \"secret-tool store --label=msmtpd host localhost service smtp user %s\""
        ", or give a command that prints it: --auth=%s,COMMAND" % (user, user))
    raise _StartError("no password for %s: %s%s" % (user, ", ".join(tried), hint))


def _look_up(user: str, command: str, inetd: bool) -> Iterator[tuple[bytes, str]]:
    """Look in one place after the other; yield what it says, and why that may be no password."""
    if command:
        import subprocess
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=False,
                              stdin=subprocess.DEVNULL if inetd else None)
        failure = "failed, with exit status %d" % done.returncode if done.returncode else ""
        yield (b"" if failure else done.stdout,
               "the password command of --auth " + (failure or "printed no password"))
        return
    yield _run_lookup("secret-tool", "lookup", "host", "localhost", "service", "smtp",
                      "user", user)
    try:
        import keyring  # type: ignore[import-not-found, unused-ignore]
        password = keyring.get_password("smtp://localhost", user) or ""
        yield password.encode("utf-8", "surrogateescape"), "keyring: no such entry"
    except ImportError:
        yield b"", "no Python package keyring"
    except Exception as error:      # each of its back ends raises its own
        yield b"", "keyring: %s" % _shown(_why(error))
    if sys.platform == "darwin":
        yield _run_lookup("security", "find-internet-password", "-s", "localhost", "-r", "smtp",
                          "-a", user, "-w")
    yield (b"", "no prompt under inetd") if inetd else _ask_terminal(user)


def _run_lookup(*arguments: str) -> tuple[bytes, str]:
    """What a look-up program prints, or why that is nothing."""
    import subprocess
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except FileNotFoundError:
        return b"", "no program %s" % arguments[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        return b"", "%s: %s" % (arguments[0], error)
    errors = done.stderr.decode("utf-8", "replace").strip()
    why_not = _shown(errors.split(": ", 1)[-1]) or "no such entry, or the key ring is locked"
    return b"" if done.returncode else done.stdout, "%s: %s" % (arguments[0], why_not)


def _ask_terminal(user: str) -> tuple[bytes, str]:
    import getpass
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))    # or else getpass would ask on standard input
        return getpass.getpass("Password of %s: " % user).encode(), "none was typed"
    except UnicodeDecodeError as error:     # whose text would show some of the password
        return error.object, "none was typed"
    except EOFError:
        return b"", "none was typed"
    except OSError:
        return b"", "no terminal to ask on"


def _tls_context(options: argparse.Namespace) -> ssl.SSLContext:
    """A context for TLS 1.2 and newer. Raises _StartError where the files are not in order."""
    try:
        import ssl
    except ImportError:
        raise _StartError("this Python has no ssl module, and so no TLS") from None
    certificate, key = options.tls_cert_file, options.tls_key_file or options.tls_cert_file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    # Clients that use libesmtp take a ticket for the reply that they wait for, and hang.
    context.num_tickets = 0

    def refuse() -> str:
        raise _StartError("the key in %s is encrypted; decrypt it first, with "
                          "\"openssl pkey -in KEY -out FILE\"" % key)
    try:
        for name, part in (certificate, b"CERTIFICATE"), (key, b"PRIVATE KEY"):
            with open(name, "rb") as file:      # which may be a pipe that can be read but once
                if os.path.isfile(name) and part + b"-----" not in file.read(1024 * 1024):
                    raise _StartError("there is no %s in %s, in PEM format; if it is in another "
                                      "file, name that with --tls-cert-file or --tls-key-file"
                                      % (part.decode().lower(), name))
        context.load_cert_chain(certificate, key, refuse)
    except ssl.SSLError as error:
        raise _StartError("cannot use the certificate in %s with the key in %s: %s" % (
            certificate, key, re.sub(r" \(_ssl\.c.*", "", str(error)))) from None
    except OSError as error:
        raise _StartError("cannot read %s: %s" % (error.filename or key, error.strerror)) from None
    return context


def _make_server(options: argparse.Namespace, log: _Log) -> tuple[Server, Command]:
    """The server that the options describe, and the command it delivers to."""
    sockets = _inherited_sockets(options.inetd)
    users: list[Authenticate] = []

    def authenticate(user: str, password: str) -> bool:
        # All are asked each time, so that the time tells nothing about which users there are.
        return True in [is_this(user, password) for is_this in users]
    try:
        stdout = os.open(os.devnull, os.O_WRONLY) if options.inetd else None
        command = Command(options.command, timeout=options.delivery_timeout, stdout=stdout)
        server = Server(command, options.interface or "127.0.0.1", options.port,
                        authenticate=authenticate if options.auth else None,
                        tls=_tls_context(options) if options.tls_cert_file else None,
                        starttls=options.tls_starttls == "on", received=options.received == "on",
                        max_size=options.max_size, max_sessions=options.max_sessions,
                        timeout=options.timeout, sockets=sockets,
                        log=log)    # type: ignore[arg-type]
    except ValueError as error:     # it begins with an argument's name, as the option has it
        raise _StartError("--" + str(error).replace("_", "-", 1)) from None
    users += [one_user(user, _find_password(user, program, options.inetd))
              for user, program in options.auth]        # last, since it may ask
    for text in command.warnings:
        log.tell("warning: " + text, _INFO)
    return server, command


def _run_inetd(options: argparse.Namespace, log: _Log) -> int:
    """Serve one client on standard input and output."""
    os.environ.pop("NOTIFY_SOCKET", None)
    connection, peer = _standard_streams()
    if options.tls_cert_file and isinstance(connection, _Descriptors):
        raise _StartError("TLS needs a socket as standard input and output")
    server, command = _make_server(options, log)
    slots = _Slots()
    _stop_by_signal(slots, command)
    slots.late_until = float("inf")     # always, since no memory of failures outlives this process
    return 0 if server._new_session(connection, slots, peer)._run() else 1


def _run_daemon(options: argparse.Namespace, log: _Log) -> int:
    """Serve until a signal comes; at SIGHUP open the log and load the certificate anew."""
    import gc
    notify = os.environ.pop("NOTIFY_SOCKET", "")
    server, command = _make_server(options, log)
    service = _start_server(server, options)
    _stop_by_signal(service, command)
    asked: list[int] = []
    if not os.isatty(2) and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: asked.append(number))
    _announce(server, log, options)
    gc.freeze()         # what is there now stays: the collector need not look through it each time
    _notify(notify, b"READY=1")
    while not service.wait():
        if not asked:
            continue
        asked.clear()           # first, since what comes from now on asks for another time
        log.info("SIGHUP")      # which makes the log notice that its file was moved
        try:    # not into the context in use: OpenSSL forbids that, and the new may be unfit
            if options.tls_cert_file:
                server.tls = _tls_context(options)
                log.info("loaded the certificate anew")
        except _StartError as error:
            log.error("kept the certificate: %s", error)
    _notify(notify, b"STOPPING=1")
    if os.isatty(2):
        log.tell("stopping once the mails under way are delivered; Ctrl-C again stops at once")
    service.join()
    log.info("stopped")
    return 0


def _start_server(server: Server, options: argparse.Namespace) -> _Service:
    """Start the server; return what serves. Raises _StartError, which hints at what to do."""
    try:
        return server._start(anew=True)
    except (OSError, RuntimeError, MemoryError) as error:
        number = getattr(error, "errno", None) or 0
        others = {"::": "0.0.0.0", "::1": "127.0.0.1", "0.0.0.0": "::"}
        hints = {errno.EADDRINUSE: "; end the program that has it, or try another --port",
                 errno.EADDRNOTAVAIL: "; this machine has no such address",
                 errno.EAFNOSUPPORT: "; the kernel knows no such addresses, try --interface="
                 + others.get(server.host, "::1"),
                 errno.EACCES: "; ports below 1024 are for root: try --port=2500"}
        raise _StartError("cannot listen on %s port %d: %s%s" % (
            ", ".join(options.interface or ["127.0.0.1"]), options.port,
            os.strerror(number) if number else _why(error), hints.get(number, ""))) from None


def _announce(server: Server, log: _Log, options: argparse.Namespace) -> None:
    """Say where the server listens, and warn where that asks for more protection."""
    places = " and ".join(str(peer) if peer.host else "a Unix socket"
                          for peer in server.addresses)
    log.info("listening on %s, piping mails to: %s", places, options.command)
    if any(peer.host and peer.host != "::1" and not peer.host.startswith("127.")
           for peer in server.addresses):
        if not options.auth:
            log.tell("warning: anybody who reaches %s can send mail; use --auth" % places, _INFO)
        elif not server.tls:
            log.tell("warning: passwords come to %s unencrypted; use --tls-cert-file" % places,
                     _INFO)
    if os.getpid() == 1:
        log.tell("warning: as process 1 this reaps no orphans of the command; use an init, such as "
                 "that of docker run --init", _INFO)
    import tempfile
    try:
        tempfile.gettempdir()
    except OSError:
        log.tell("warning: no folder for temporary files can be written, so mails over %d KiB take "
                 "memory; set TMPDIR" % (MAX_MEMORY // 1024), _INFO)
    if os.isatty(2) and server.addresses[0].host:
        client = ("nc %s %s" if options.tls_starttls == "on" else
                  "openssl s_client -connect [%s]:%s")
        log.tell("listening on %s, piping mails to: %s (to try it: %s; to stop it: Ctrl-C)"
                 % (places, options.command, client % (server.host, server.port)))


def _stop_by_signal(slots: _Slots, command: Command) -> None:
    """Let SIGTERM, SIGINT and the end of the terminal end the server in good order, and a second
    SIGTERM or SIGINT at once; what is ignored, as SIGINT in the background, stays so.
    """
    # A run takes its limit, and twice the delay if SIGKILL does not end it; a third is spare.
    patience = command._timeout + 3 * KILL_DELAY

    def stop(number: int, frame: object) -> None:
        # The end of a terminal may be told twice, by the kernel and a shell.
        if slots.stopping and number != signal.SIGHUP:
            for run in list(command._runs):
                run.signal(signal.SIGTERM)
            os._exit(1)
        slots.stop(GRACE, patience)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[:3 if os.isatty(2) else 2]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _inherited_sockets(inetd: bool) -> list[socket.socket]:
    """The sockets that systemd passes (sd_listen_fds(3)). Raises _StartError for unfit ones."""
    pid, number, _ = (os.environ.pop("LISTEN_" + name, "") for name in ("PID", "FDS", "FDNAMES"))
    if inetd or pid != str(os.getpid()) or not number.isdecimal():
        return []
    import socket
    sockets = []
    for descriptor in range(3, 3 + int(number)):
        listens = 0
        with contextlib.suppress(OSError):      # it is no socket at all
            sockets.append(socket.socket(fileno=descriptor))
            listens = sockets[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens:
            raise _StartError("descriptor %d of LISTEN_FDS is no listening socket; for Accept=yes "
                              "use --inetd" % descriptor)
    return sockets


def _notify(address: str, state: bytes) -> None:
    """Tell systemd (sd_notify(3)), if it wants to hear."""
    if address:
        import socket
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as notification:
            notification.sendto(state, re.sub("^@", "\0", address))


if __name__ == "__main__":
    # At once: Python would first spend milliseconds on freeing what the kernel frees anyway.
    os._exit(main())
