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

A client is told that its mail is accepted only once `deliver` has returned. If it raises a
TemporaryFailure or PermanentFailure, the client is told that instead. To answer with errors on
purpose, override a verb's method in a subclass of Session; see there.

The protocol is RFC 5321 with PIPELINING (RFC 2920), SIZE (1870), 8BITMIME (6152), SMTPUTF8
(6531), ENHANCEDSTATUSCODES (2034, 3463), STARTTLS (3207) and AUTH PLAIN and LOGIN (4954).
"""

from __future__ import annotations

import collections
import errno
import functools
import io
import itertools
import os
import re
import select
import signal
import sys
import time

TYPE_CHECKING = False  # as typing's own, whose import would cost inetd users some milliseconds
if TYPE_CHECKING:
    import email.message
    import logging
    import socket
    import ssl
    import types
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from typing import Any, BinaryIO, ContextManager, Union

    Deliver = Callable[["Mail"], None]      # not object, so that a checker finds an async one
    Check = Callable[[str, "Mail"], None]
    Authenticate = Callable[[str, str], bool]
    Start = Callable[[str, list[bytes], tuple[int, int, int]], int]
    Log = Union[logging.Logger, logging.LoggerAdapter[Any], "ErrorsOnly"]

__version__ = "1.0"
__all__ = ["Server", "Session", "Mail", "Peer", "Reply", "Command", "TemporaryFailure",
           "PermanentFailure", "Refused", "Disconnect", "one_user", "smtpd_handler", "main"]

# ---------------------------------------------------------------------------------------------
# Limits; some are the defaults of arguments of Server and Command
# ---------------------------------------------------------------------------------------------

MAX_SIZE = 64 * 1024 * 1024        # bytes of mail data as received; at least 64 K: 4.5.3.1.7
MAX_MEMORY = 1024 * 1024           # bytes of mail data kept in memory; if larger, it goes to a file
MAX_SESSIONS = 16                  # served at a time, further clients wait in the listen queue
MAX_RECIPIENTS = 1000              # of one mail; at least 100: RFC 5321 4.5.3.1.8
MAX_RECIPIENT_BYTES = 256 * 1024   # of all together: they become arguments, which ARG_MAX bounds
MAX_HOPS = 5                       # times that a mail may come here: RFC 5321 6.3
MAX_LINE = 2048                    # bytes, end included; at least 512 plus extensions: 4.5.3.1.4
MAX_AUTH_LINE = 12288              # bytes of a line in an AUTH exchange: RFC 4954 section 4
MAX_ENDLESS_LINE = 65536           # bytes after which the end of a line is no longer waited for
MAX_ERRORS = 10                    # protocol errors in a session, the last answered by 421
MAX_AUTH_FAILURES = 3              # in a session, the last answered by 421
MAX_REPLY_LINE = 512               # bytes, end included: RFC 5321 4.5.3.1.5
MAX_ERROR_OUTPUT = 4096            # bytes kept of what a command writes to standard error
MAX_ERROR_TEXT = 300               # bytes of it that a reply repeats
MAX_LOGGED = 200                   # characters of a value from outside that a log line repeats
TIMEOUT = 300.0                    # seconds that a client may be silent: RFC 5321 4.5.3.2.7
FULL_TIMEOUT = 10.0                # the same while all sessions are taken
MIN_RATE = 500.0                   # bytes per second at which mail data has to come
DELIVERY_TIMEOUT = 540.0           # seconds for a command: clients wait 600, RFC 5321 4.5.3.2.6
KILL_DELAY = 5.0                   # seconds from a command's SIGTERM to its SIGKILL
AUTH_DELAY = 1.0                   # seconds by which the answer to a failed AUTH is late
AUTH_MEMORY = 60.0                 # seconds after a failure for which every answer to AUTH is late
GRACE = 30.0                       # seconds that the program gives mail data when it is stopped
MAX_LEFT = 16                      # mails are deferred once so many commands cannot be ended
MOMENT = 0.02                      # seconds for which a call on a socket may block, blind to a stop
SHORT_PAUSE = 0.0005               # seconds until the first look at whether a command has ended
LISTEN_QUEUE = 4096                # clients that wait; the kernel may cut it, Linux to somaxconn
CHUNK = 65536                      # bytes per read
LARGE_CHUNK = 196608               # the same for a large mail: fewer wake-ups, yet fits the cache
GATHERED = 4096                    # bytes of replies to gather; more are sent at once
GATHERING = 1.0                    # seconds for which they are gathered while verbs are slow


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------

class Peer(collections.namedtuple("Peer", ("host", "port"))):
    """Where a client is: `host`, an IP address as text, and `port`; None where there is none."""

    __slots__ = ()

    def __str__(self) -> str:
        return "a local client" if self.host is None else "[%s]:%s" % (self.host, self.port)


class Reply:
    """A reply: `code` (RFC 5321 4.2), `enhanced` status code (RFC 3463, "" for none), `lines`."""

    __slots__ = ("code", "enhanced", "lines")

    def __init__(self, code: int, enhanced: str, *lines: str) -> None:
        self.code, self.enhanced, self.lines = code, enhanced, lines or ("",)

    def __bytes__(self) -> bytes:
        """The reply as it is sent: printable ASCII, lines of at most 512 bytes (4.5.3.1.5)."""
        return _encode(self.code, self.enhanced, tuple(self.lines))

    def __repr__(self) -> str:
        return "%d %s %s" % (self.code, self.enhanced, " ".join(self.lines))


class Refused(Exception):
    """Raised by a verb's method to answer with `reply` and go on with the session.

    is_error: whether MAX_ERRORS counts it, by default where the enhanced code is 5.5.X, which
    RFC 3463 3.6 has for what goes wrong with the protocol.
    """

    def __init__(self, reply: Reply, is_error: bool | None = None) -> None:
        super().__init__(reply)
        self.reply = reply
        self.is_error = reply.enhanced.startswith("5.5.") if is_error is None else is_error


class Disconnect(Exception):
    """Raised by a verb's method to end the session, after `reply` where one is given."""

    def __init__(self, reply: Reply | None = None, reason: str = "") -> None:
        super().__init__(reply, reason)
        self.reply, self.reason = reply, reason


class _Failure(Exception):
    """What `deliver` and `check` raise; the codes of each subclass begin with its `digit`."""

    digit = 0

    def __init__(self, text: str = "", code: int | None = None, enhanced: str | None = None,
                 details: Sequence[str] = ()) -> None:
        super().__init__(text)
        if code is not None and not (isinstance(code, int) and code // 100 == self.digit):
            raise ValueError("%s takes codes %d00 to %d99, not %r"
                             % (type(self).__name__, self.digit, self.digit, code))
        if enhanced is not None and not re.fullmatch(
                r"%d(\.[0-9]{1,3}){2}" % self.digit, enhanced):
            raise ValueError("%s takes enhanced codes %d.X.X, not %r"
                             % (type(self).__name__, self.digit, enhanced))
        self.code, self.enhanced, self.details = code, enhanced, details

    def reply(self, code: int, detail: str, text: str) -> Reply:
        """The reply to give; `code`, `detail` (as "3.0") and `text` stand in for what it lacks."""
        if code // 100 != self.digit:
            code = 451
        text = str(self)[:MAX_REPLY_LINE] or text       # more of it would not be sent
        return Reply(self.code or code, self.enhanced or "%d.%s" % (self.digit, detail), text)


class TemporaryFailure(_Failure):
    """Raised by `deliver` or `check`: the client should try again later.

    text: what the client is told, in printable ASCII. code: from 400 to 499, 451 if None; 421 ends
    the session. enhanced: as "4.X.X" (RFC 3463); if None, as for PermanentFailure, with 4 for 5.
    details: lines for the log. Raises ValueError for codes of another class.
    """

    digit = 4


class PermanentFailure(_Failure):
    """Raised by `deliver` or `check`: the client should give up.

    As TemporaryFailure, with `code` from 500 to 599 and `enhanced` as "5.X.X"; if None, 554 5.3.0
    in `deliver`, and in `check` 553 5.1.7 for a sender and 553 5.1.3 for a recipient.
    """

    digit = 5


class Spool:
    """Mail data: up to `MAX_MEMORY` bytes in memory, more in an unlinked file of mode 0600.

    has_descriptor: whether another process can read it as its standard input.
    """

    def __init__(self) -> None:
        self._file: BinaryIO = io.BytesIO()
        self._on_disk = False
        self.has_descriptor = False
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append `data`. Raises OSError if the disk is full, MemoryError if memory is."""
        size = self.size + len(data)
        if size > MAX_MEMORY and not self._on_disk:
            self._move_to_disk()
        elif size > CHUNK and not self.has_descriptor:
            self._move_to_memory()
        self._file.write(data)
        self._file.flush()      # now, while an error is still noticed
        self.size = size

    def ensure_descriptor(self) -> None:
        """Move the data, if need be, to where there is a descriptor for it. Raises OSError."""
        if not (self.has_descriptor or self._move_to_memory()):
            self._move_to_disk()

    def _move_to_memory(self) -> bool:
        """Move the data to memory with a descriptor; return False if the system has none."""
        try:
            memory = os.memfd_create("msmtpd")
        except (AttributeError, OSError):   # not Linux, or forbidden
            return False
        self._move(open(memory, "w+b"))
        return True

    def _move_to_disk(self) -> None:
        import tempfile
        self._move(tempfile.TemporaryFile(prefix="msmtpd-"))
        self._on_disk = True

    def _move(self, file: BinaryIO) -> None:
        old, self._file = self.file(), file
        try:
            for piece in iter(lambda: old.read(CHUNK), b""):
                file.write(piece)
            file.flush()
        except BaseException:
            self.close()
            self._file = old        # which is whole
            raise
        old.close()
        self.has_descriptor = True
        # Not by __del__: the garbage collector may come to the file first, and then warns of it.
        import weakref
        weakref.finalize(self, _drop, file)

    def file(self) -> BinaryIO:
        """The data as a file, open for reading from its start."""
        self._file.seek(0, os.SEEK_END)     # drops what is buffered, so that the next seek moves
        self._file.seek(0)                  # the descriptor, too
        return self._file

    def close(self) -> None:
        """Drop the data."""
        _drop(self._file)


def _drop(file: BinaryIO) -> None:
    """Close a file whose content does not matter any more."""
    try:
        file.close()
    except OSError:     # what could not be written before cannot be now
        pass


class Mail:
    """One mail and its envelope.

    sender: the reverse-path, "" for <>. recipients: the forward-paths, in the order accepted.
    peer: the client's Peer. helo: the name it gave. user: as whom it authenticated, or None.
    tls: whether it came over TLS. smtputf8: whether its addresses may be more than ASCII.
    outcome: text for the log line, which a `deliver` may set, as Command sets "exit=0".
    spool: the mail data, kept for as long as this object; over 64 KiB, it takes a descriptor. To be
    used by one thread at a time.
    """

    def __init__(self, sender: str, recipients: Sequence[str] = (), data: bytes = b"", *,
                 peer: Peer = Peer(None, None), helo: str = "", user: str | None = None,
                 tls: bool = False, smtputf8: bool = False) -> None:
        self.sender, self.recipients = sender, list(recipients)
        self.peer, self.helo, self.user = peer, helo, user
        self.tls, self.smtputf8 = tls, smtputf8
        self.outcome = ""
        self.spool = Spool()
        self.spool.write(data)

    @property
    def size(self) -> int:
        """The number of bytes of `data`."""
        return self.spool.size

    @property
    def file(self) -> BinaryIO:
        """The mail data as a binary file, at its start; always the same file, not to be closed."""
        return self.spool.file()

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

    def __repr__(self) -> str:
        return "<Mail from %r to %r, %d bytes>" % (self.sender, self.recipients, self.size)


def _refuse_result(result: object) -> None:
    """Raise TypeError if `deliver` or `check` returned an awaitable, or what was meant to refuse.

    Taken for success, either would lose the mail.
    """
    if hasattr(result, "__await__"):
        getattr(result, "close", lambda: None)()    # or else Python warns of it later
        raise TypeError("deliver and check have to be plain functions, not async ones")
    if result is False or isinstance(result, str) and re.match("[45][0-9][0-9]", result):
        raise TypeError("to refuse, raise TemporaryFailure or PermanentFailure; %r was returned"
                        % (result,))


class Settings(collections.namedtuple("Settings", (
        "deliver", "checks", "tls", "starttls", "received", "max_size", "timeout"))):
    """What all sessions of a server share: see Server's arguments; `checks` are asked in turn."""

    __slots__ = ()


DEBUG, INFO, ERROR = 10, 20, 40     # as in logging, whose import would cost inetd users a lot


class ErrorsOnly:
    """The log for those who want none: an error is a line on standard error, the rest dropped."""

    def isEnabledFor(self, level: int) -> bool:
        """Whether records of that level are shown."""
        return level >= ERROR

    def log(self, level: int, message: str, *values: object, exc_info: bool = False) -> None:
        """Write it, if it is an error."""
        if level < ERROR:
            return
        text = message % values
        if exc_info:
            import traceback
            text += "\n" + traceback.format_exc().rstrip()
        _tell(text)


def _report(log: Log, level: int, message: str, *values: object, exc_info: bool = False) -> None:
    """Log it; a log that fails changes no reply and ends no thread."""
    try:
        log.log(level, message, *values, exc_info=exc_info)
    except Exception:
        pass


def _why(error: BaseException) -> str:
    """What an exception says, or its name: many a MemoryError says nothing."""
    return str(error) or type(error).__name__


def _tell(text: str) -> None:
    """Write a line to standard error."""
    try:
        os.write(2, ("msmtpd: %s\n" % text).encode("utf-8", "backslashreplace"))
    except OSError:
        pass


@functools.lru_cache(maxsize=64)
def _encode(code: int, enhanced: str, lines: Sequence[str]) -> bytes:
    """A reply as it is sent; cached, since the same few are sent again and again."""
    prefix = enhanced and enhanced + " "
    texts = ["%d-%s%s" % (code, prefix, _plain(line)) for line in lines]
    texts[-1] = texts[-1].replace("-", " ", 1)
    return "".join([text[:MAX_REPLY_LINE - 2] + "\r\n" for text in texts]).encode("ascii")


def _plain(text: str) -> str:
    """`text` fit for a reply: printable ASCII, as RFC 5321 4.2 wants it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text)


def _shown(value: str) -> str:
    """`value`, which came from outside, fit for a log line: escaped, and cut."""
    value = value[:MAX_LOGGED]
    if value.isprintable() and "\\" not in value:
        return value
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode()
                   for c in value)[:MAX_LOGGED]


# ---------------------------------------------------------------------------------------------
# Grammar: pure functions on text
# ---------------------------------------------------------------------------------------------

# RFC 5321 4.1.2 and RFC 6531 3.3, except that dots may be anywhere in a local part, where
# some devices put them, and underscores in domains.
_ATEXT = r"""[^\x00-\x20\x7f"(),:;<>@\[\\\]]"""
_LOCAL_PART = r"""(?:%s+|"(?:[^\x00-\x1f\x7f"\\]|\\[ -~])*")""" % _ATEXT
# Letters, digits and _, as a negated set: one that reaches to U+10FFFF takes 45 ms to compile.
_LETTERS = r"[^\x00-/:-@\[-^`{-\x7f]+"
_LITERAL = (r"\[(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|IPv6:[0-9A-Fa-f:.]+"
            r"|(?!IPv6:)[0-9A-Za-z-]*[0-9A-Za-z]:[!-Z^-~]+)\]")
_DOMAIN = r"(?:{0}(?:(?:-+|\.){0})*|{1})".format(_LETTERS, _LITERAL)
# What shapes letters of Persian and Indic scripts; domains may hold it: RFC 5892 A.1, A.2.
_JOINERS = r"(?<=[^\x00-\x7f])[\u200c\u200d]"
# A source route is dropped, so its domains are not checked.
_PATH = re.compile(
    r' *(?P<angle><(?:@[^\s"<>@,]+(?:,(?=@)|:(?!@)))*)?(?P<mailbox>%s(?:@%s)?)?(?(angle)>)'
    r"(?: +(?P<rest>.*))?" % (_LOCAL_PART, _DOMAIN))
_PARAMETER = r"([0-9A-Za-z][0-9A-Za-z-]*)(?:=([^\x00-\x20\x7f]*))?"

# Parameters that are offered, and those that some clients send although they are not.
MAIL_PARAMETERS = frozenset(("SIZE", "BODY", "SMTPUTF8", "AUTH", "RET", "ENVID"))
RCPT_PARAMETERS = frozenset(("NOTIFY", "ORCPT"))

_INERT = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@._+/=:%,-"

# Methods that web pages can make a browser send, and those of other HTTP clients.
HTTP_METHODS = frozenset(
    b"CONNECT DELETE GET HEAD OPTIONS PATCH POST PRI PROPFIND PUT TRACE".split())


class HTTPRequest(Exception):
    """The client speaks HTTP."""


def parse_verb(line: bytes) -> tuple[str, str]:
    """Split a client's line, without its end, into its verb in upper case and its argument.

    Raises HTTPRequest, or ValueError saying what is wrong with its bytes.
    """
    return (_split_cached if line[:5].rstrip(b" ").upper() in _REPEATED else _split)(line)


def _split(line: bytes) -> tuple[str, str]:
    if is_http(line):
        raise HTTPRequest
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError("Not UTF-8") from None
    if not text.isprintable() and any(c < " " or c == "\x7f" for c in text):
        raise ValueError("Control character")
    verb, _, argument = text.partition(" ")
    return (verb.upper() if verb.isascii() else ""), argument.strip(" ")


# Lines with these verbs come again and again; any other, which may hold a password, is not kept.
_REPEATED = frozenset(b"EHLO HELO MAIL RCPT DATA RSET NOOP QUIT".split())
_split_cached = functools.lru_cache(maxsize=64)(_split)


@functools.lru_cache(maxsize=64)
def parse_path(argument: str, keyword: str) -> tuple[str | None, str] | None:
    """Read ``FROM:<path> parameters``, `keyword` being ``FROM`` or ``TO`` (RFC 5321 4.1.1.2, 3).

    Returns the address ("" for <>, None where it is no valid one; a source route is dropped) and
    the text of the parameters; None where the keyword or the colon is missing.
    """
    name, colon, text = argument.partition(":")
    if not colon or name.upper() != keyword:
        return None
    match = _PATH.fullmatch(text)
    angle, address, rest = match.group("angle", "mailbox", "rest") if match else ("", None, "")
    if address is None:
        return ("" if angle == "<" else None), rest or ""
    # A leading hyphen could make it an option of the command; what is unprintable, nobody can see.
    visible = address.isprintable() or re.sub(_JOINERS, "", address).isprintable()
    valid = visible and not address.startswith("-")
    return (address if valid else None), rest or ""


def parse_parameters(text: str) -> dict[str, str] | None:
    """Read ``NAME=value NAME`` (RFC 5321 4.1.2) with names in upper case; None for bad syntax."""
    parameters: dict[str, str] = {}
    for word in text.split():
        match = re.fullmatch(_PARAMETER, word)
        if match is None or match.group(1).upper() in parameters:
            return None
        parameters[match.group(1).upper()] = match.group(2) or ""
    return parameters


def is_inert(address: str) -> bool:
    """Whether no shell, the command's own or one behind it, can read `address` as code."""
    return not address.strip(_INERT) or all(
        c in _INERT or (c > "\x7f" and c.isalpha()) for c in address)


def is_http(line: bytes) -> bool:
    """Whether a line is the request line of HTTP (RFC 9112 section 3)."""
    return (line.partition(b" ")[0].upper() in HTTP_METHODS
            or b" HTTP/" in line and re.search(br" HTTP/\d(\.\d)?$", line) is not None)


def is_header(line: bytes) -> bool:
    """Whether a line looks like a header field rather than a verb and its argument."""
    name, colon, _ = line.partition(b":")
    return colon != b"" and name.replace(b"-", b"0").isalnum()


def parse_plain(response: bytes) -> tuple[str, str] | None:
    """User and password in a PLAIN response (RFC 4616 section 2), None where it is not one.

    The authorization identity, for whom the user wants to act, is ignored.
    """
    fields = response.split(b"\0")
    if len(fields) != 3:
        return None
    try:
        return fields[1].decode(), fields[2].decode()
    except UnicodeDecodeError:
        return None


def shown_name(argument: str) -> str:
    """The name given with HELO or EHLO, as the Received line shows it."""
    if not argument:
        return "unknown"
    return argument if re.fullmatch(r"[0-9A-Za-z._:\[\]-]{1,255}", argument) else "invalid"


def received_line(name: str, peer: Peer, protocol: str, when: float) -> bytes:
    """The trace field (RFC 5321 4.4) of a mail received `when`, in seconds since the epoch."""
    host = peer.host and peer.host.partition("%")[0]
    address = " ([%s%s])" % ("IPv6:" if ":" in host else "", host) if host else ""
    return ("Received: from %s%s\n\tby localhost (msmtpd) with %s;\n\t%s\n"
            % (name, address, protocol, mail_date(when))).encode("ascii", "replace")


def count_hops(mail: BinaryIO) -> int:
    """How many of received_line's fields a mail has, from here or another msmtpd.py on its way."""
    header = mail.read(CHUNK).partition(b"\n\n")[0]
    return header.count(b"by localhost (msmtpd) with ")


def mail_date(when: float) -> str:
    """`when`, in seconds since the epoch, as RFC 5322 3.3 writes it, in local time."""
    t = time.localtime(when)
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    # strftime's names would follow the locale; email.utils, which has them, is slow to import.
    return "%s, %d %s %s" % (days[t.tm_wday], t.tm_mday, months[t.tm_mon - 1],
                             time.strftime("%Y %H:%M:%S %z", t))


class Transparency:
    """Turns mail data as received, in pieces cut anywhere, into lines that end in LF.

    One leading dot of a line is removed (RFC 5321 4.5.2), and a bare CR, which the next server
    might take for the end of a line (SMTP smuggling), becomes a space.
    """

    def __init__(self) -> None:
        self._held = b""            # a CR whose LF may begin the next piece
        self._at_line_start = True

    def decode(self, piece: bytes) -> bytes:
        """Return the next piece, converted. The last one has to end in LF."""
        if self._held:
            piece, self._held = self._held + piece, b""
        if piece.endswith(b"\r"):
            piece, self._held = piece[:-1], b"\r"
        if not piece:
            return b""
        lines = piece.replace(b"\r", b"")
        if len(piece) - len(lines) != piece.count(b"\r\n"):     # not every CR was that of a CR LF
            lines = piece.replace(b"\r\n", b"\n").replace(b"\r", b" ")
        dot = self._at_line_start and lines.startswith(b".")
        self._at_line_start = lines.endswith(b"\n")
        if b"." in lines:
            lines = lines.replace(b"\n.", b"\n")
        return lines[1:] if dot else lines


# ---------------------------------------------------------------------------------------------
# Wire: bytes, lines, mail data and deadlines
# ---------------------------------------------------------------------------------------------

class Gone(Exception):
    """The client closed or broke the connection; the text may hint at why."""


class Silent(Exception):
    """The client neither sent nor took anything for too long, or was too slow; as Gone."""


class Stopping(Exception):
    """The server is stopping, and this session with it."""


class TLSHello(Exception):
    """The client began TLS where plain text was due."""


class LineTooLong(Exception):
    """A line is too long; `start` is its beginning, `endless` whether its end was given up on."""

    def __init__(self, start: bytes, endless: bool) -> None:
        super().__init__(start, endless)
        self.start, self.endless = start, endless


class _Watch:
    """Waits for descriptors. To reuse one is cheaper than to make another."""

    def __init__(self, readers: Iterable[int], writers: Iterable[int] = ()) -> None:
        self._readers, self._writers = readers, writers
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll:
            for descriptor in readers:
                self._poll.register(descriptor, select.POLLIN)
            for descriptor in writers:
                self._poll.register(descriptor, select.POLLOUT)

    def wait(self, seconds: float | None) -> Collection[int]:
        """Wait up to `seconds`, 0 or more, for ever if None; return the descriptors then ready."""
        if self._poll:
            return dict(self._poll.poll(None if seconds is None else 1000 * seconds))
        ready = select.select(self._readers, self._writers, (), seconds)
        return ready[0] + ready[1]


class Slots:
    """Whether the sessions are to end, and whether all slots for them are taken.

    Sessions only read it; their server changes it. `drain`, which a signal handler may call,
    wakes all who wait for `descriptor`, by closing its other end. waiting: the threads that wait
    for a client, None where there can be no further one.
    """

    def __init__(self, wake_reader: Any, wake_writer: Any) -> None:
        self._reader, self._writer = wake_reader, wake_writer
        self._pid = os.getpid()
        self.descriptor: int = wake_reader.fileno()
        self.waiting: Collection[int] | None = None
        # On time.monotonic()'s clock: until when mail data may come once the server stops, and
        # until when a delivery is waited for.
        self.drain_until: float | None = None
        self.leave_at = float("inf")

    @property
    def full(self) -> bool:
        """Whether all slots are taken."""
        return self.waiting is not None and not self.waiting

    def drain(self, grace: float, patience: float) -> None:
        """Begin to end the sessions, as Server.drain says."""
        until = time.monotonic() + grace
        self.leave_at = min(self.leave_at, until + patience)
        self.drain_until = until if self.drain_until is None else min(self.drain_until, until)
        try:
            if not self.is_copy() and hasattr(self._writer, "shutdown"):
                self._writer.shutdown(2)        # SHUT_RDWR: reaches a fork's copies, too
        except OSError:     # closed before
            pass
        self._writer.close()

    def is_copy(self) -> bool:
        """Whether this process was forked since, and so lacks the threads of the sessions."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Close the descriptors. Nobody may be waiting for them."""
        self._writer.close()
        self._reader.close()

    __del__ = close     # for when a session was left behind


class Wire:
    """The client's bytes, read as lines or as mail data; replies are gathered and sent together.

    Works on one socket or on two descriptors, be they pipes, sockets or a terminal. Every method
    that waits raises Gone, Silent or Stopping, but for has_left and close.
    """

    def __init__(self, source: int, sink: int, receive: Callable[[int], bytes],
                 send: Callable[[bytes], int], end_output: Callable[[], object], slots: Slots,
                 timeout: float) -> None:
        self._source, self._sink = source, sink
        self._receive, self._send, self._end_output = receive, send, end_output
        self._slots, self._timeout = slots, timeout
        self._input = b""
        self._output = b""
        self._gathered = 0.0        # when the first of it was, on time.monotonic()'s clock
        self._unheard = False       # the client takes no more replies

    @classmethod
    def of_socket(cls, connection: socket.socket, slots: Slots, timeout: float) -> Wire:
        """The wire on a connected socket."""
        import socket
        import struct
        # A socket's timeouts are a timeval, but a plain number on Windows; and on some big-endian
        # machines its microseconds are only the first half of a long.
        blocking = (os.name == "posix" and sys.byteorder == "little"
                    and connection.gettimeout() is None)
        moment = struct.pack("ll", 0, int(1e6 * MOMENT))
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO) if blocking else ():
                connection.setsockopt(socket.SOL_SOCKET, option, moment)
        except OSError:
            blocking = False
        if not blocking:
            connection.setblocking(False)
        return cls(connection.fileno(), connection.fileno(), connection.recv, connection.send,
                   lambda: connection.shutdown(socket.SHUT_WR), slots, timeout)

    @classmethod
    def of_descriptors(cls, source: int, sink: int, slots: Slots, timeout: float) -> Wire:
        """The wire on two descriptors, whose flags are left alone: others may share them."""
        readable, ready_to_take = _Watch((source,)), _Watch((), (sink,))

        def receive(size: int) -> bytes:
            if not readable.wait(0):
                raise BlockingIOError
            return os.read(source, size)

        def send(data: bytes) -> int:
            if not ready_to_take.wait(0):
                raise BlockingIOError
            return os.write(sink, data[:512])   # POSIX's least PIPE_BUF: fits once writable
        return cls(source, sink, receive, send, lambda: None, slots, timeout)

    def read_line(self, limit: int) -> tuple[bytes, bytes]:
        """Return the next line without its end, and that end, LF or CR LF.

        Raises LineTooLong beyond `limit` bytes, once the line has ended or MAX_ENDLESS_LINE is
        reached, and TLSHello.
        """
        deadline = time.monotonic() + self._timeout
        data = self._input or self._pull(deadline, idle=True)
        while True:
            line, newline, self._input = data.partition(b"\n")
            if line.startswith(b"\x16\x03"):     # RFC 8446 5.1: a handshake record
                raise TLSHello
            if len(line) >= MAX_ENDLESS_LINE:
                raise LineTooLong(line[:limit], endless=True)
            if newline:
                break
            data += self._pull(deadline, idle=True)
        if len(line) >= limit:
            raise LineTooLong(line[:limit], endless=False)
        return (line[:-1], b"\r\n") if line.endswith(b"\r") else (line, b"\n")

    def read_mail_data(self, before: bytes, ends: Sequence[bytes]) -> Iterator[bytes]:
        """Yield mail data as it was received, in pieces, up to the first of `ends`.

        Each of these begins with a line end: that of the last line of the data, which is yielded,
        too, or, if the data is empty, `before`, that of the line before the data.
        """
        start = time.monotonic()
        data, self._input = self._input or self._pull(start + self._timeout), b""
        received = len(data)
        data, done = before + data, len(before)     # data[:done] is not to be yielded
        while True:
            # One byte is found ten times as fast as a string, and base64 has no dots.
            found = b"." in data and [(data.find(end), end) for end in ends if end in data]
            if found:
                at, end = min(found)
                self._input = data[at + len(end):]
                yield data[done:at + end.index(b".")]
                return
            keep = max(0, len(data) - 4)                # the longest end, less its last byte
            piece, data, done = data[done:keep], data[keep:], max(0, done - keep)
            if piece:
                yield piece
            del piece           # no more than `data` is held while the client is waited for
            held, now = len(data), time.monotonic()
            try:
                data += self._pull(self._timeout + min(now, start + received / MIN_RATE),
                                   size=CHUNK if received < CHUNK else LARGE_CHUNK)
            except (Gone, Silent) as end:
                if data.endswith((b"\n.\n", b"\n.\r\n")):      # the client waited for the reply
                    end.args = ("; mail data has to end in CR LF . CR LF",)
                raise
            received += len(data) - held

    def write(self, data: bytes) -> None:
        """Send `data`, at the latest before the next wait for the client."""
        now = time.monotonic()
        if not self._output:
            self._gathered = now
        self._output += data
        if len(self._output) > GATHERED or now - self._gathered > GATHERING:
            self.flush()

    def flush(self) -> None:
        """Send what `write` has gathered."""
        if self._output:
            data, self._output = self._output, b""
            self._push(data, time.monotonic() + self._timeout)

    def has_left(self) -> bool:
        """Whether the client has closed its side by now; does not wait for it to."""
        try:
            if not (self._unheard or self._input) and _Watch((self._source,)).wait(0):
                self._input += self._pull(time.monotonic() + 1.0)
        except Gone:
            return True
        except (Silent, Stopping, MemoryError):
            pass
        return self._unheard

    def close(self, farewell: bytes, linger: bool) -> None:
        """Send `farewell` if the client takes it within a second, or else give it up.

        linger: whether to read and drop for a while what the client still sends, as it does not
        expect the end: a socket that is closed with unread input is reset, and the client may
        never see the farewell.
        """
        deadline = time.monotonic() + 1.0
        data, self._output = self._output + farewell, b""
        try:
            self._push(data, deadline)
            if linger:
                self._end_output()
                if self._slots.full:        # somebody may be waiting for this slot
                    deadline = time.monotonic() + 0.1
                while self._slots.drain_until is None:
                    self._pull(deadline, idle=True)
        except (Gone, Silent, Stopping, OSError):
            pass

    def _pull(self, deadline: float, idle: bool = False, size: int = CHUNK) -> bytes:
        """Return the client's next bytes, at most `size`, after sending it what is gathered."""
        if self._output:
            self.flush()
        if self._slots.drain_until is not None or time.monotonic() >= deadline:
            self._wait(True, deadline, idle)
        # Mostly the client speaks at once. A socket waits a MOMENT for that by itself, which costs
        # one system call instead of two, and releases the interpreter lock only once.
        while True:
            try:
                data = self._receive(size)
            except BlockingIOError:
                self._wait(True, deadline, idle)
                continue
            except OSError as error:
                raise Gone from error
            if not data:
                raise Gone
            return data

    def _push(self, data: bytes, deadline: float) -> None:
        """Send `data`, waiting while the client does not read.

        If it takes no more at all, that is no error: what it sent before is still to be read.
        """
        while data and not self._unheard:
            try:
                data = data[self._send(data):]
            except BlockingIOError:
                self._wait(False, deadline)
            except OSError:
                self._unheard = True

    def _wait(self, reading: bool, deadline: float, idle: bool = False) -> None:
        """Wait for the client; if `idle`, a stop of the server ends the wait at once."""
        slots, client = self._slots, self._source if reading else self._sink
        stop: tuple[int, ...] = (slots.descriptor,)
        end, turn = deadline, FULL_TIMEOUT
        while True:
            if slots.drain_until is not None:
                if idle:
                    raise Stopping
                # In short turns, as a further drain may bring the end forward.
                stop, end, turn = (), min(deadline, slots.drain_until), 0.2
            left = end - time.monotonic()
            if left <= 0:
                raise Stopping if end < deadline else Silent
            watch = _Watch((client, *stop)) if reading else _Watch(stop, (client,))
            ready = watch.wait(min(left, turn))
            if client in ready:
                return
            if stop and slots.full and not ready:
                raise Silent
            turn = 1.0      # nobody tells a session that the slots have been filled


class TLSWire(Wire):
    """A wire within TLS on the wire `plain`, whose unread input is dropped (CVE-2011-0411)."""

    def __init__(self, plain: Wire, context: ssl.SSLContext) -> None:
        import ssl
        super().__init__(plain._source, plain._sink, plain._receive, plain._send,
                         plain._end_output, plain._slots, plain._timeout)
        self._plain = plain
        self._want_read = ssl.SSLWantReadError
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_side=True)

    def handshake(self) -> str:
        """Agree with the client on TLS; return the version agreed. Raises ssl.SSLError, too."""
        deadline = time.monotonic() + self._timeout
        try:
            self._repeat(self._tls.do_handshake, deadline, idle=True)
        finally:
            super()._push(self._to_send.read(), deadline)       # the alert, where it failed
        return self._tls.version() or ""

    def has_left(self) -> bool:
        """As Wire's; what has come but is not decrypted yet is not looked at."""
        return not self._tls.pending() and super().has_left()

    def close(self, farewell: bytes, linger: bool) -> None:
        """As Wire's, followed by TLS's own farewell."""
        super().close(farewell, False)
        try:
            self._tls.unwrap()      # RFC 8446 6.1; the answer is not awaited
        except OSError:
            pass
        # Below TLS from here on: what the client still sends is dropped, not decrypted.
        self._plain.close(self._to_send.read(), linger)

    def _repeat(self, operation: Callable[[], Any], deadline: float, idle: bool) -> Any:
        """Call `operation` until it no longer wants to hear more from the client."""
        while True:
            try:
                return operation()
            except self._want_read:
                super()._push(self._to_send.read(), deadline)
                self._received.write(super()._pull(deadline, idle))

    def _pull(self, deadline: float, idle: bool = False, size: int = CHUNK) -> bytes:
        self.flush()
        try:
            data: bytes = self._repeat(lambda: self._tls.read(size), deadline, idle)
        except OSError as error:            # ssl.SSLError is one
            raise Gone from error
        if not data:
            raise Gone
        return data

    def _push(self, data: bytes, deadline: float) -> None:
        try:
            if data:
                self._tls.write(data)
        except OSError as error:
            raise Gone from error
        super()._push(self._to_send.read(), deadline)


# ---------------------------------------------------------------------------------------------
# Session: one method for each verb
# ---------------------------------------------------------------------------------------------

class Session:
    """One client's dialogue, made by a Server. To change what a verb does, override its method.

    A method takes the verb's argument, a str without control characters or outer spaces. It
    returns a Reply, or None for no reply but those that it has sent by `send`, or raises Refused
    or Disconnect. A reply 221 or 421 ends the session, and so does any other exception, also one
    of those for `deliver`. A further verb needs a method and an entry in VERBS, in upper case.
    Here one method refuses a recipient, one is slow, and one drops the connection:

    >>> import msmtpd, smtplib, time
    >>> class Grumpy(msmtpd.Session):
    ...     def do_RCPT(self, argument):
    ...         if "nobody@" in argument:
    ...             return msmtpd.Reply(550, "5.1.1", "No such user here")
    ...         return super().do_RCPT(argument)
    ...     def do_NOOP(self, argument):
    ...         time.sleep(0.01)
    ...         return super().do_NOOP(argument)
    ...     def do_VRFY(self, argument):
    ...         raise msmtpd.Disconnect()
    >>> with msmtpd.Server(deliver=print, session=Grumpy) as server:
    ...     client = smtplib.SMTP(server.host, server.port)
    ...     _ = client.ehlo(), client.mail("a@example.org")
    ...     print(client.rcpt("nobody@example.org"), client.noop()[0])
    ...     try:
    ...         _ = client.verify("a")
    ...     except smtplib.SMTPServerDisconnected:
    ...         print("dropped")
    (550, b'5.1.1 No such user here') 250
    dropped

    number: of this session in its server, from 1. peer: the client's Peer. helo: the name it
    gave, "" before that. user: as whom it authenticated, or None. mail: the Mail of the
    transaction, from MAIL to the end of the mail data, or None; `deliver` gets this very object.
    """

    def __init__(self, wire: Wire, settings: Settings, authenticator: Authenticator | None,
                 log: Log, number: int = 1, peer: Peer = Peer(None, None)) -> None:
        self.number, self.peer = number, peer
        self.helo = ""
        self.user: str | None = None
        self.mail: Mail | None = None
        self._wire, self._settings, self._authenticator = wire, settings, authenticator
        self._log = log
        self._debugging, self._informing = log.isEnabledFor(DEBUG), log.isEnabledFor(INFO)
        self._tls = False           # inside TLS
        self._protocol = ""         # by the last greeting, "" before that
        self._extended = False      # EHLO was said, even if HELO followed
        self._room = 0              # bytes left for further recipients of the transaction
        self._first_line = True     # no line was read so far
        self._line_end = b""        # of the last line
        self._bare_lf = True        # each line so far ended in LF without CR
        self._errors = 0            # protocol errors
        self._failures = 0          # of AUTH
        self._undelivered = False   # at least one mail was not delivered

    def run(self) -> bool:
        """Serve the client to the end; raise nothing.

        Returns whether all went well: no 421, no transaction cut off, each mail delivered.
        """
        reply: Reply | None = None
        self._info("connect from %s", self.peer)
        try:
            reply = self._converse()
            reason = "QUIT" if reply.code == 221 else "by the server: " + _shown(repr(reply))
        except Disconnect as end:
            reason, reply = end.reason or "by the server", end.reply
        except Gone as end:
            reason = "the client left%s%s" % (" in mid-transaction" if self.mail else "", end)
        except Silent as end:
            reason = "the client was silent or too slow%s" % end
            reply = Reply(421, "4.4.2", "Waited for too long%s" % end)
        except Stopping:
            reason, reply = "the server stops", Reply(421, "4.3.2", "Shutting down")
        except TLSHello:
            reason = "the client spoke TLS to a plain port"
        except HTTPRequest:
            reason = "the client spoke HTTP"
            reply = Reply(421, "4.7.0", "This is no web server")
        except BaseException:
            self._error("internal error", exc_info=True)
            reason, reply = "internal error", Reply(421, "4.3.0", "Internal error")
        if reply and self._debugging:
            self._show(reply)
        clean = not (self.mail or self._undelivered or reply and reply.code == 421)
        self._info("closed: %s", reason)
        self._wire.close(bytes(reply) if reply else b"", bool(reply and reply.code != 221))
        return clean

    # The dialogue

    def _converse(self) -> Reply:
        """Greet, and answer line by line; return the reply that ends the session."""
        if self._settings.tls and not self._settings.starttls:
            self._start_tls()
        reply: Reply | None = self.greet()
        while True:
            if reply is not None:
                if reply.code in (221, 421):        # RFC 5321 3.8
                    return reply
                self.send(reply)
            reply = self._answer()

    def greet(self) -> Reply:
        """The first reply: RFC 5321 3.1."""
        return Reply(220, "", "localhost ESMTP msmtpd")

    def _answer(self) -> Reply | None:
        """Read one line and return the reply to it, None for no further one."""
        verb = argument = ""
        try:
            verb, argument = self._read_verb()
            method = self.VERBS.get(verb)
            if method is None:
                raise Refused(Reply(500, "5.5.1", "Unknown command"))
            reply: Reply | None = getattr(self, method)(argument)
            if reply and reply.code >= 400:     # of a subclass; this class raises its refusals
                self._log_refusal(verb, argument, reply)
            return reply
        except Refused as refusal:
            self._log_refusal(verb, argument, refusal.reply)
            self._errors += refusal.is_error
            if self._errors >= MAX_ERRORS:
                raise Disconnect(Reply(421, "4.7.0", "Too many errors"), "errors") from None
            return refusal.reply

    def _read_verb(self) -> tuple[str, str]:
        """Return the next line's verb, in upper case, and its argument."""
        line = self._read_line()
        if len(line) + len(self._line_end) > MAX_LINE and line[:5].upper() != b"AUTH ":
            self._refuse_http(line)
            raise Refused(Reply(500, "5.5.2", "Line too long"))
        try:
            verb, argument = parse_verb(line)
        except ValueError as error:
            raise Refused(Reply(500, "5.5.2", str(error))) from None
        if self._debugging:
            # Only what cannot be a password, which the lines after a refused AUTH may hold.
            shown = verb if verb in self.VERBS else "(unknown)"
            if verb in ("EHLO", "HELO", "MAIL", "RCPT"):
                shown += " " + argument
            self._debug("C: %s", _shown(shown))
        return verb, argument

    def _read_line(self) -> bytes:
        """Return the next line without its end."""
        try:
            line, self._line_end = self._wire.read_line(MAX_AUTH_LINE)
        except LineTooLong as error:
            self._bare_lf = False
            self._refuse_http(error.start)
            if error.endless:
                raise Disconnect(Reply(421, "4.5.2", "Endless line"), "endless line") from None
            raise Refused(Reply(500, "5.5.2", "Line too long")) from None
        if self._line_end != b"\n":
            self._bare_lf = False
        if self._first_line:        # parse_verb looks at later ones, once at those it caches
            self._refuse_http(line)
        return line

    def _refuse_http(self, line: bytes) -> None:
        """Raise HTTPRequest for a browser: a web page could put a mail behind its request."""
        if is_http(line) or self._first_line and is_header(line):
            raise HTTPRequest
        self._first_line = False

    def send(self, reply: Reply) -> None:
        """Send a reply, at the latest before the next wait for the client."""
        if self._debugging:
            self._show(reply)
        self._wire.write(bytes(reply))

    def _show(self, reply: Reply) -> None:
        for line in bytes(reply).decode().splitlines():
            self._debug("S: %s", line)

    def _info(self, message: str, *values: object) -> None:
        if self._informing:
            _report(self._log, INFO, "session %d: " + message, self.number, *values)

    def _debug(self, message: str, *values: object) -> None:
        _report(self._log, DEBUG, "session %d: " + message, self.number, *values)

    def _error(self, message: str, *values: object, exc_info: bool = False) -> None:
        _report(self._log, ERROR, "session %d: " + message, self.number, *values,
                exc_info=exc_info)

    # The verbs, in the order of a session

    def do_EHLO(self, argument: str) -> Reply | None:
        """Greet the client and tell it the extensions: RFC 5321 4.1.1.1."""
        extensions = ["PIPELINING", "SIZE %d" % self._settings.max_size, "8BITMIME", "SMTPUTF8",
                      "ENHANCEDSTATUSCODES"]
        if self._authenticator and (self._tls or not self._settings.tls):
            extensions.append("AUTH PLAIN LOGIN")
        if self._settings.tls and not self._tls:
            extensions.append("STARTTLS")
        self._extended = True
        self._greet_back(argument, "ESMTP")
        return Reply(250, "", "localhost", *extensions)

    def do_HELO(self, argument: str) -> Reply | None:
        """Greet the client: RFC 5321 4.1.1.1."""
        self._greet_back(argument, "SMTP")
        return Reply(250, "", "localhost")

    def _greet_back(self, name: str, protocol: str) -> None:
        self.helo, self._protocol, self.mail = name, protocol, None

    def do_STARTTLS(self, argument: str) -> Reply | None:
        """Go on within TLS, as if the session had just begun: RFC 3207."""
        if not self._settings.tls:
            raise Refused(Reply(502, "5.5.1", "STARTTLS is not offered"))
        self._require(not self._tls, "Already in TLS")
        if argument:
            raise Refused(Reply(501, "5.5.4", "STARTTLS takes no argument"))
        self.send(Reply(220, "2.0.0", "Go ahead"))
        self._start_tls()
        return None

    def do_AUTH(self, argument: str) -> Reply | None:
        """Authenticate the client by PLAIN or LOGIN: RFC 4954."""
        if not self._authenticator:
            raise Refused(Reply(502, "5.5.1", "AUTH is not offered"))
        if self._settings.tls and not self._tls:
            raise Refused(Reply(538, "5.7.11", "Say STARTTLS first"))
        self._require(self._extended, "Say EHLO first")
        self._require(self.user is None, "Authenticated already")
        self._require(self.mail is None, "Not allowed in a transaction")
        mechanism, _, initial = argument.partition(" ")
        if mechanism.upper() not in ("PLAIN", "LOGIN"):
            raise Refused(Reply(504, "5.5.4", "Mechanisms are PLAIN and LOGIN"))
        is_login = mechanism.upper() == "LOGIN"
        response = (self._response(initial.strip(" ")) if initial
                    else self.ask(b"Username:" if is_login else b""))
        if is_login:        # asks for each by itself; some clients compare the prompts
            response = b"\0%b\0%b" % (response, self.ask(b"Password:"))
        parsed = parse_plain(response)
        if parsed is None:
            raise Refused(Reply(501, "5.5.2", "Bad response"))
        return self._authenticate(*parsed)

    def do_MAIL(self, argument: str) -> Reply | None:
        """Begin a transaction: RFC 5321 4.1.1.2."""
        self._require(self._protocol, "Say EHLO first")
        self._require(self.mail is None, "In a transaction already")
        if self._authenticator and self.user is None:
            raise Refused(Reply(530, "5.7.0", "Authentication required"))
        sender, parameters = self._parse_envelope(argument, "FROM", "5.1.7", MAIL_PARAMETERS)
        if parameters:
            self._check_parameters(parameters)
        mail = Mail(sender, peer=self.peer, helo=self.helo, user=self.user, tls=self._tls,
                    smtputf8="SMTPUTF8" in parameters)
        self._check(sender, mail, "1.7")
        self.mail, self._room = mail, MAX_RECIPIENT_BYTES
        return Reply(250, "2.1.0", "Sender accepted")

    def do_RCPT(self, argument: str) -> Reply | None:
        """Add a recipient: RFC 5321 4.1.1.3."""
        mail = self._transaction()
        recipient, _ = self._parse_envelope(argument, "TO", "5.1.3", RCPT_PARAMETERS)
        if not recipient:
            raise Refused(Reply(501, "5.1.3", "<> is no recipient"))
        size = len(recipient.encode())
        if len(mail.recipients) >= MAX_RECIPIENTS or size > self._room:
            raise Refused(Reply(452, "4.5.3", "Too many recipients; send the rest separately"))
        mail.recipients.append(recipient)       # by which `check` tells it from the sender
        try:
            self._check(recipient, mail, "1.3")
        except Refused:
            mail.recipients.pop()
            raise
        self._room -= size
        return Reply(250, "2.1.5", "Recipient accepted")

    def do_DATA(self, argument: str) -> Reply | None:
        """Take the mail data, and deliver: RFC 5321 4.1.1.4."""
        mail = self._transaction()
        self._require(mail.recipients, "Recipients first")
        if argument:
            raise Refused(Reply(501, "5.5.4", "DATA takes no argument"))
        self.send(Reply(354, "", "Send the mail, then a line with only a dot"))
        self._wire.flush()      # so that the client sends while the rest is made ready
        problem = self._receive(mail) or self._refuse_loop(mail)
        self.mail = None
        if problem:
            self._info("refused the mail data: %r", problem)
        started = time.monotonic()
        reply = problem or self._deliver(mail)
        seconds = time.monotonic() - started
        self._log_mail(mail, reply, seconds)
        if seconds > 0.05 and self._wire.has_left():    # hardly any client leaves sooner
            self._info("the client left before the reply")
        return reply

    def do_BDAT(self, argument: str) -> Reply | None:
        """End the session, before the data that follows is taken for verbs: RFC 3030."""
        raise Disconnect(Reply(503, "5.5.1", "BDAT is not offered"), "BDAT")

    def do_RSET(self, argument: str) -> Reply | None:
        """Give up the transaction: RFC 5321 4.1.1.5."""
        self.mail = None
        return Reply(250, "2.0.0", "Reset")

    def do_VRFY(self, argument: str) -> Reply | None:
        """Promise nothing: RFC 5321 4.1.1.6, 7.3."""
        return Reply(252, "2.0.0", "Cannot verify, but will try to deliver")

    def do_EXPN(self, argument: str) -> Reply | None:
        """Refuse: RFC 5321 4.1.1.7, 7.3."""
        raise Refused(Reply(502, "5.5.1", "There are no mailing lists"))

    def do_HELP(self, argument: str) -> Reply | None:
        """List the verbs: RFC 5321 4.1.1.8."""
        return Reply(214, "2.0.0", "Verbs: " + " ".join(self.VERBS))

    def do_NOOP(self, argument: str) -> Reply | None:
        """Do nothing: RFC 5321 4.1.1.9."""
        return Reply(250, "2.0.0", "Here")

    def do_QUIT(self, argument: str) -> Reply | None:
        """End the session: RFC 5321 4.1.1.10."""
        return Reply(221, "2.0.0", "Goodbye")

    VERBS: dict[str, str] = {
        "EHLO": "do_EHLO", "HELO": "do_HELO", "STARTTLS": "do_STARTTLS", "AUTH": "do_AUTH",
        "MAIL": "do_MAIL", "RCPT": "do_RCPT", "DATA": "do_DATA", "BDAT": "do_BDAT",
        "RSET": "do_RSET", "VRFY": "do_VRFY", "EXPN": "do_EXPN", "HELP": "do_HELP",
        "NOOP": "do_NOOP", "QUIT": "do_QUIT",
    }

    # What the verbs share

    def _require(self, condition: object, text: str) -> None:
        """Refuse a verb out of order: RFC 5321 4.1.4."""
        if not condition:
            raise Refused(Reply(503, "5.5.1", text))

    def _transaction(self) -> Mail:
        """The mail of the transaction. Raises Refused outside of one."""
        if self.mail is None:
            raise Refused(Reply(503, "5.5.1", "Say MAIL first"))
        return self.mail

    def _too_big(self) -> Reply:
        return Reply(552, "5.3.4", "Mail exceeds %d bytes" % self._settings.max_size)

    def _parse_envelope(self, argument: str, keyword: str, detail: str,
                        known: frozenset[str]) -> tuple[str, dict[str, str]]:
        """Read the argument of MAIL or RCPT; return the address and the parameters."""
        parsed = parse_path(argument, keyword)
        if parsed is None:
            raise Refused(Reply(501, "5.5.2", "Syntax is %s:<address>" % keyword))
        address, rest = parsed
        if address is None:
            raise Refused(Reply(501, detail, "Bad address syntax"))
        parameters = parse_parameters(rest)
        if parameters is None:
            raise Refused(Reply(501, "5.5.4", "Bad parameter syntax"))
        if not known.issuperset(parameters):
            raise Refused(Reply(555, "5.5.4", "Unknown parameter"))
        return address, parameters

    def _check_parameters(self, parameters: dict[str, str]) -> None:
        """Refuse values that MAIL cannot have: RFC 1870 6.1, RFC 6152, RFC 6531 3.4."""
        size, body = parameters.get("SIZE", "0"), parameters.get("BODY", "7BIT")
        if (not re.fullmatch("[0-9]{1,20}", size) or body.upper() not in ("7BIT", "8BITMIME")
                or parameters.get("SMTPUTF8")):
            raise Refused(Reply(501, "5.5.4", "Bad value of SIZE, BODY or SMTPUTF8"))
        if 0 < self._settings.max_size < int(size):
            raise Refused(self._too_big())

    def _check(self, address: str, mail: Mail, detail: str) -> None:
        """Raise Refused for an address that needs SMTPUTF8 without it, or that `check` refuses."""
        if not (address.isascii() or mail.smtputf8):
            raise Refused(Reply(553, "5.6.7", "Address needs SMTPUTF8"))
        try:
            for check in self._settings.checks:
                _refuse_result(check(address, mail))
        except _Failure as failure:
            self._log_details(failure)
            raise Refused(failure.reply(553, detail, "Address refused"), False) from None
        except BaseException:
            self._error("check raised", exc_info=True)
            raise Refused(Reply(451, "4.3.0", "Internal error")) from None

    def _start_tls(self) -> None:
        """Begin the session afresh within TLS: RFC 3207 4.2."""
        assert self._settings.tls is not None
        self._wire.flush()
        wire = TLSWire(self._wire, self._settings.tls)
        try:
            version = wire.handshake()
        except OSError as error:            # ssl.SSLError is one
            raise Disconnect(None, "TLS handshake failed: %s" % error) from None
        except (Silent, Stopping):          # a 421 in plain text would not be understood
            raise Disconnect(None, "no TLS handshake in time") from None
        self._info("%s", version)
        self._wire, self._tls = wire, True
        self.helo, self._protocol, self.mail, self._extended = "", "", None, False

    # Authentication

    def ask(self, challenge: bytes) -> bytes:
        """Send a challenge of AUTH and return the client's response, both without their base64.

        Raises Refused if the client cancels, or its response is not base64.
        """
        import base64
        self.send(Reply(334, "", base64.b64encode(challenge).decode()))
        line = self._read_line()
        self._refuse_http(line)
        response = line.decode("latin-1")
        self._debug("C: (hidden)")
        if response == "*":
            raise Refused(Reply(501, "5.5.2", "Cancelled"))
        return self._response(response)

    def _response(self, text: str) -> bytes:
        """A response without its base64; "=" is an empty one (RFC 4954 section 4)."""
        import base64
        try:
            return base64.b64decode("" if text == "=" else text, validate=True)
        except ValueError:      # binascii.Error is one
            raise Refused(Reply(501, "5.5.2", "Bad base64")) from None

    def _authenticate(self, user: str, password: str) -> Reply:
        assert self._authenticator is not None
        self._wire.flush()
        try:
            accepted = self._authenticator.verify(user, password)
        except BaseException as error:
            # Its text might hold the password, and so might a traceback.
            self._error("authenticate raised %s", type(error).__name__)
            return Reply(454, "4.7.0", "Cannot authenticate now")
        if accepted:
            self.user = user
            self._info("authenticated as %s", _shown(user))
            return Reply(235, "2.7.0", "Authenticated")
        self._failures += 1
        self._info("authentication failed")
        if self._failures >= MAX_AUTH_FAILURES:
            raise Disconnect(Reply(421, "4.7.0", "Too many failures"), "too many failures")
        return Reply(535, "5.7.8", "Wrong user name or password")

    # Mail data

    def _receive(self, mail: Mail) -> Reply | None:
        """Read the mail data to its end, whatever goes wrong; return the reply if anything did."""
        # People at a terminal and printf | nc end lines in a bare LF; another server never does.
        ends = (b"\r\n.\r\n", b"\n.\n") if self._bare_lf else (b"\r\n.\r\n",)
        transparency, received = Transparency(), 0
        head = self._trace() if self._settings.received else b""
        problem = self._spool(mail, head)
        for piece in self._wire.read_mail_data(self._line_end, ends):
            received += len(piece)
            if problem:
                continue
            if 0 < self._settings.max_size < received:
                problem = self._too_big()
                mail.spool.close()
                continue
            lines = transparency.decode(piece)
            if head and mail.size == len(head) and lines[:1] in (b" ", b"\t"):
                lines = b"\n" + lines       # or else that line would continue the field
            problem = self._spool(mail, lines)
            del piece, lines        # not to be held while the next is waited for
        return problem

    def _refuse_loop(self, mail: Mail) -> Reply | None:
        """Return the reply if what mails are piped to sends them back here: RFC 5321 6.3.

        Each time takes a session, which waits for the next: the limit leaves room for others.
        """
        try:
            if self._settings.received and count_hops(mail.file) > MAX_HOPS:
                return Reply(554, "5.4.6", "Mail loop: it has been here %d times" % MAX_HOPS)
            return None
        except (OSError, MemoryError) as error:
            return self._no_room(mail, error)

    def _spool(self, mail: Mail, data: bytes) -> Reply | None:
        """Keep `data`; return the reply where that fails."""
        try:
            mail.spool.write(data)
            return None
        except (OSError, MemoryError) as error:
            return self._no_room(mail, error)

    def _no_room(self, mail: Mail, error: BaseException) -> Reply:
        """Drop a mail that cannot be kept; return the reply to it."""
        self._error("cannot spool: %s", _why(error))
        mail.spool.close()
        return Reply(452, "4.3.1", "No room for the mail now")

    def _trace(self) -> bytes:
        """The Received line, its protocol as RFC 3848 and RFC 6531 4.3 name it."""
        assert self.mail is not None
        extensions = ("S" if self._tls else "") + ("A" if self.user is not None else "")
        # No name has these behind SMTP: who used them spoke ESMTP, whatever the last greeting was.
        protocol = ("UTF8SMTP" if self.mail.smtputf8 else "ESMTP" if extensions
                    else self._protocol)
        return received_line(shown_name(self.helo), self.peer, protocol + extensions, time.time())

    def _deliver(self, mail: Mail) -> Reply:
        """Call `deliver`; return the reply for what it returned or raised."""
        try:
            _refuse_result(self._settings.deliver(mail))
            return Reply(250, "2.0.0", "Delivered")
        except _Failure as failure:
            self._log_details(failure)
            return failure.reply(554, "3.0", "Delivery failed")
        except BaseException:
            self._error("deliver raised", exc_info=True)
            return Reply(451, "4.3.0", "Internal error")

    def _log_refusal(self, verb: str, argument: str, reply: Reply) -> None:
        """Log that a sender or a recipient was refused."""
        if verb in ("MAIL", "RCPT"):
            self._info("refused %s %s: %s", verb, _shown(argument), _shown(repr(reply)))

    def _log_details(self, failure: _Failure) -> None:
        for line in failure.details:
            self._error("%s", _shown(line))

    def _log_mail(self, mail: Mail, reply: Reply, seconds: float) -> None:
        """Log in one line what became of the mail."""
        self._undelivered = self._undelivered or reply.code != 250
        if not self._informing:
            return
        status = {2: "sent", 4: "deferred"}.get(reply.code // 100, "failed")
        outcome = " " + mail.outcome if mail.outcome else ""
        sender, *recipients = ("<%s>" % _shown(address).replace(">", "\\x3e")
                               for address in (mail.sender, *mail.recipients))
        self._info("mail from=%s to=%s size=%d status=%s%s seconds=%.3f", sender,
                   ",".join(recipients), mail.size, status, outcome, seconds)


# ---------------------------------------------------------------------------------------------
# Authentication
# ---------------------------------------------------------------------------------------------

class Authenticator:
    """The password check, with a memory of failures that makes guessing slow in all sessions."""

    def __init__(self, authenticate: Authenticate, always_late: bool = False) -> None:
        self._authenticate, self._always_late = authenticate, always_late
        self._late_until = float("-inf")    # only assigned, so it needs no lock

    def verify(self, user: str, password: str) -> bool:
        """Whether they are right; takes AUTH_DELAY seconds if not, or after a recent failure.

        Raises what `authenticate` raises, just as late.
        """
        accepted = False
        try:
            # Nobody has an empty one (RFC 4616 section 2), but a directory may take it for a login
            # without a name: RFC 4513 5.1.2. True, or a database's 1; a coroutine, or an object
            # with the result in it, is neither.
            accepted = bool(user and password) and self._authenticate(user, password) in (True,)
        finally:
            # Remembered before the delay, so that no guess made meanwhile is answered sooner.
            if not accepted:
                self._late_until = time.monotonic() + AUTH_MEMORY
            if self._always_late or time.monotonic() < self._late_until:
                time.sleep(AUTH_DELAY)
        return accepted


def one_user(user: str, password: str) -> Authenticate:
    """An `authenticate` that accepts one user, comparing in constant time."""
    import hmac
    right_user, right_password = (text.encode("utf-8", "surrogateescape")
                                  for text in (user, password))

    def authenticate(user: str, password: str) -> bool:
        same_user = hmac.compare_digest(user.encode(), right_user)
        return hmac.compare_digest(password.encode(), right_password) and same_user
    return authenticate


# ---------------------------------------------------------------------------------------------
# Delivery: one command, run for each mail
# ---------------------------------------------------------------------------------------------

EXIT_REPLIES: dict[int, tuple[int, str]] = {    # any other status is 554 5.3.0; see sysexits.h
    65: (554, "5.6.0"),     # EX_DATAERR
    67: (554, "5.1.1"),     # EX_NOUSER
    68: (451, "4.3.0"),     # EX_NOHOST
    69: (451, "4.3.0"),     # EX_UNAVAILABLE
    71: (451, "4.3.0"),     # EX_OSERR
    75: (451, "4.3.0"),     # EX_TEMPFAIL
    77: (554, "5.7.0"),     # EX_NOPERM
    78: (554, "5.3.5"),     # EX_CONFIG
    126: (451, "4.3.5"),    # not executable
    127: (451, "4.3.5"),    # not found
}

# Programs that hand their arguments to a shell, or read them as one would.
SHELLS = frozenset("""
    adb ash autossh bash busybox clush csh dash dbclient doas dsh elvish eval expect fish flock
    hush ksh lksh make mksh mosh nu oksh osh parallel pdksh pdsh plink posh pssh pwsh rbash rc
    remsh rksh rlogin rsh rsync runuser rzsh sash scp screen script sg sh slogin ssh su sudo
    systemd-run tclsh tcsh tmux toybox watch xargs xonsh yash ysh zsh
""".split())

# What a shell takes literally, what is special to it anywhere else, and what may precede the name
# of a program.
_QUOTED = r"""'[^']*'|"(?:[^"\\$`]|\\["\\])*"|\\."""
_SPECIAL = frozenset("|&;<>()$`\\\"'*?[]{}~#!^")
_BEFORE_PROGRAM = r"\w+=.*|[!{]|do|then|else|elif|if|while|until|exec|eval|command"


class Command:
    """The `deliver` that pipes each mail to a command line of /bin/sh.

    text: the command line. The first ``%F`` in it becomes the sender (MAILER-DAEMON for <>), and
    the recipients are appended as arguments. timeout: seconds that it may take. stdout: a
    descriptor for its standard output, None for the caller's own. alone: whether this process has
    no other threads, so that a command can be started faster. warnings: what may be wrong with it.
    Raises ValueError for a command line that cannot work, and where there are no POSIX processes.

    If the words need no shell, the program is started directly, otherwise by ``sh -c``, whose text
    never holds the recipients. Its environment is that of the moment when this is made. Only its
    exit status decides: see EXIT_REPLIES. After `timeout` its process group gets SIGTERM,
    KILL_DELAY seconds later SIGKILL, and the client 451. Without glibc 2.34 or newer it inherits
    which signals this process ignores and blocks.
    """

    def __init__(self, text: str = "msmtp -f %F --", *, timeout: float = DELIVERY_TIMEOUT,
                 stdout: int | None = None, alone: bool = False) -> None:
        if os.name != "posix":
            raise ValueError("a command needs a POSIX system; give Server a function instead")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise ValueError("this process ignores SIGCHLD, and so loses every exit status")
        if not timeout > 0:
            raise ValueError("timeout has to be more than 0 seconds")
        if stdout == 0:
            raise ValueError("stdout cannot be descriptor 0, where the command reads the mail")
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                raise ValueError("descriptor %d of this process is closed; open %s in its place"
                                 % (number, os.devnull)) from None
        self.text, self._timeout = text, timeout
        self._stdout = 1 if stdout is None else stdout
        self.warnings: list[str] = []
        self._start = _Starter(alone)
        self._runs: set[_Run] = set()
        self._left: set[_Run] = set()       # those that nothing could end
        self._program, words = self._parse()
        self._by_shell = not words
        self._reparser = _find_reparser(words)
        self._words = [os.fsencode(word) for word in
                       words or ("sh", "-c", text + ' "$@"', "msmtpd")]
        # Which of them holds %F, the place of the sender.
        self._place = next((n for n, word in enumerate(self._words) if b"%F" in word), None)

    def check(self, address: str, mail: object = None) -> None:
        """Raise PermanentFailure if `address` could be read as an option, program, file or code."""
        # What a command may take for an option, a program, or a file.
        unsafe = address.startswith(("-", "|")) or address.endswith("|")
        if address.startswith("+") or "/" in address:
            unsafe = unsafe or not re.search('@[^"@]*$', address)       # it has no domain
        if unsafe:
            raise PermanentFailure("Address not safe for a command", 553)
        if self._reparser and not is_inert(address):
            raise PermanentFailure("Address not safe here: " + self._reparser, 553)

    def __call__(self, mail: Mail) -> None:
        """Run the command on `mail`. Raises TemporaryFailure and PermanentFailure."""
        for address in (mail.sender, *mail.recipients):
            self.check(address)
        if self._left:
            self._reap_left()
        try:
            run = _Run(self._start, self._program, self._arguments(mail), mail, self._stdout)
        except (OSError, ValueError, MemoryError) as error:
            missing = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
            raise TemporaryFailure("Cannot start the command: " + _why(error), 451,
                                   "4.3.5" if missing else "4.3.0", [_why(error)]) from None
        self._runs.add(run)
        try:
            run.finish(self._timeout)
        finally:
            self._runs.discard(run)
            if not run.ended:
                self._left.add(run)
        mail.outcome = "exit=" + run.outcome
        if run.status != 0 or run.timed_out:
            raise self._failure(run)

    def _reap_left(self) -> None:
        """Reap those that were left behind. Raises TemporaryFailure if too many go on."""
        self._left.difference_update([run for run in list(self._left) if run.reap()])
        if len(self._left) >= MAX_LEFT:
            raise TemporaryFailure("Earlier commands do not end", 451, "4.3.0",
                                   ["%d earlier commands do not end" % len(self._left)])

    def abandon(self) -> None:
        """Send SIGTERM to all commands that run now."""
        for run in list(self._runs):
            run.kill(signal.SIGTERM)

    def _parse(self) -> tuple[str, list[str]]:
        """Return the program to start and the command's words, none if a shell has to read it."""
        if not self.text.strip():
            raise ValueError("the command is empty")
        if "\n" in self.text or "\0" in self.text:
            raise ValueError("the command holds a line break or NUL; it has to be one line")
        bare = re.sub(_QUOTED, "x", self.text) if _SPECIAL.intersection(self.text) else self.text
        if not _SPECIAL.intersection(bare) and bare.replace("\t", " ").isprintable():
            words = self.text.split()
            if bare != self.text:
                import shlex
                words = shlex.split(self.text)
            program = find_program(words[0])
            if program and not re.fullmatch(_BEFORE_PROGRAM, words[0]):
                return program, words
        self._check_for_shell(bare)
        self._ask_shell()
        return "/bin/sh", []

    def _check_for_shell(self, bare: str) -> None:
        """Raise ValueError if the recipients would not become arguments in a shell.

        bare: the command line without its quoted parts.
        """
        if bare.rstrip()[-1] in ";&|<>":
            raise ValueError("the command ends in %s, which would take a recipient for a "
                             "command or a file; end it in --" % bare.rstrip()[-1])
        if not _takes_arguments(bare):
            raise ValueError("nothing in the command takes the recipients as arguments; end it in "
                             "a program, or in :, which ignores them")
        if re.search(r"(?:^|[\s;&|()])#", bare):
            self.warnings.append("the command has a comment, which swallows the recipients")

    def _ask_shell(self) -> None:
        """Raise ValueError if the shell cannot read the command; warn if its program is missing."""
        import subprocess

        def ask(*arguments: str) -> tuple[int, str]:
            done = subprocess.run(("/bin/sh", *arguments), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            return done.returncode, done.stderr.decode("utf-8", "replace").strip()
        status, errors = ask("-n", "-c", self.text + ' "$@"')
        if status:
            raise ValueError("the shell cannot read the command: " + errors)
        word = re.match(r"(?:\w+=\S* +|exec +)*(['\"]?)([\w./+-]+)\1(?:\s|$)", self.text.strip())
        # The shell knows its builtins, too, but takes any file for a program.
        if word and not find_program(word.group(2)) and (
                "/" in word.group(2) or ask("-c", 'command -v -- "$1"', "sh", word.group(2))[0]):
            self.warnings.append("cannot find or execute the program %s; each mail will be "
                                 "deferred until that is mended" % word.group(2))

    def _arguments(self, mail: Mail) -> list[bytes]:
        """The arguments to start the program with, its own name first.

        Addresses are UTF-8 whatever the locale: in some, letters hold bytes of shell operators.
        """
        words = self._words + [recipient.encode() for recipient in mail.recipients]
        if self._place is not None:
            sender = (mail.sender or "MAILER-DAEMON").encode()
            words[self._place] = words[self._place].replace(b"%F", sender, 1)
        return words

    def _failure(self, run: _Run) -> _Failure:
        """The failure to raise for a run that was no success."""
        status = run.status
        if run.timed_out or status is None or status < 0 or self._by_shell and status > 128:
            code, enhanced = 451, "4.3.0"
        else:
            code, enhanced = EXIT_REPLIES.get(status, (554, "5.3.0"))
        errors = run.errors.decode("utf-8", "replace")
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        why = "Command failed (exit %s)" % run.outcome
        text = _plain("; ".join(lines))[:MAX_ERROR_TEXT]
        failure = TemporaryFailure if code < 500 else PermanentFailure
        return failure(why + (": " + text if text else ""), code, enhanced, lines)


def _find_reparser(words: list[str]) -> str:
    """What might read a sender or recipient as code; "" if nothing in the command might."""
    if not words:
        return "the command needs a shell"
    for word in words:
        tail = word.startswith("-") and word.find("%F") == len(word) - 2
        if "%F" in word and word != "%F" and not tail:
            return "%F is inside of a word of the command"
        for part in word.split():
            # Also bash5.2, and by their first letters bash-static, zsh5-static and sudo.ws.
            name = part.replace("=", "/").split("/")[-1].rstrip("0123456789.-")
            if not SHELLS.isdisjoint((name, re.split("[^a-z]", name)[0])):
                return "%s may hand it to a shell" % name
    return ""


def _takes_arguments(bare: str) -> bool:
    """Whether words appended to a command line, here without its quoted parts, become arguments.

    They do if its last command has a program: after mere assignments, redirections and reserved
    words, which may precede one, the first of them would be the program.
    """
    if bare.endswith("\\"):
        return False
    before = ""
    while bare != before:       # from the innermost parentheses outwards
        before, bare = bare, re.sub(r"\$?\([^()]*\)|`[^`]*`", "x", bare)
    bare = re.sub(r"[0-9]*(?:>>|>\||[<>]&|<<|<>|[<>])[ \t]*[^ \t;&|<>()]*", " ", bare)
    words = re.findall(r"[^ \t]+", re.split("[;&|()]", bare)[-1])
    while words and re.fullmatch(_BEFORE_PROGRAM, words[0]):
        del words[0]
    return bool(words)


class _Run:
    """One run of the command, in a session, and so a process group, of its own.

    status: as subprocess's returncode, None if it was lost. timed_out: whether its time ran out.
    errors: the head of its standard error. ended: whether it was reaped.
    """

    def __init__(self, start: Start, program: str, arguments: list[bytes], mail: Mail,
                 stdout: int) -> None:
        self.status: int | None = None
        self.timed_out = False
        self.errors = b""
        self.ended = False
        self._pause = SHORT_PAUSE           # between looks at a process without a pidfd
        self._stderr: int | None = None     # these two are descriptors
        self._pidfd: int | None = None
        stdin = _open_input(mail)
        try:
            self._stderr, stderr = os.pipe()
            try:
                self._pid = start(program, arguments, (stdin, stdout, stderr))
            finally:
                os.close(stderr)
        except BaseException:
            self._close()
            raise
        finally:
            os.close(stdin)
        # Linux with Python 3.9, unless forbidden; without it the process is looked at in turns.
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except (AttributeError, OSError, MemoryError):
            pass

    @property
    def outcome(self) -> str:
        """How it ended, for the log: the exit status, "signal N", "timeout" or "lost"."""
        if self.timed_out:
            return "timeout"
        if self.status is None:
            return "lost"
        return str(self.status) if self.status >= 0 else "signal %d" % -self.status

    def finish(self, seconds: float) -> None:
        """Wait for the command to end; after `seconds`, make it end."""
        deadline, signals = time.monotonic() + seconds, [signal.SIGTERM, signal.SIGKILL]
        try:
            # Mostly it ends at once; watching its standard error, too, would mean waking up twice.
            if self._pidfd is not None and _Watch((self._pidfd,)).wait(min(seconds, 0.01)):
                self.reap()
            while not self.ended:
                now = time.monotonic()
                if now >= deadline:
                    self.timed_out = True
                    if not signals:     # another user's, or stuck in the kernel
                        break
                    self.kill(signals.pop(0))
                    deadline = now + KILL_DELAY
                self._work(min(deadline - now, 3600.0))
            if self.timed_out and signals:      # SIGTERM was enough
                self._end_group(deadline)
        except BaseException:
            self.kill(signal.SIGKILL)
            raise
        finally:
            self._close()

    def _work(self, seconds: float) -> None:
        """Wait for its end or its error output, at most `seconds`, and take what there is."""
        if self._pidfd is None:
            seconds = min(seconds, self._pause)
            self._pause = min(2 * self._pause, 0.05)
        ready = _Watch([fd for fd in (self._stderr, self._pidfd) if fd is not None]).wait(seconds)
        if self._pidfd is None or self._pidfd in ready:
            self.reap()
        if self._stderr in ready and not self.ended:
            self._read_errors()

    def _end_group(self, deadline: float) -> None:
        """Give the rest of the group, too, until `deadline` to end, and then kill it.

        Only those that hold standard error are waited for: a signal reaches zombies, too.
        """
        while self._stderr is not None and time.monotonic() < deadline and self._signal_group(0):
            if _Watch((self._stderr,)).wait(0.05):
                self._read_errors()
        self._signal_group(signal.SIGKILL)

    def kill(self, number: int) -> None:
        """Send a signal to the whole process group, unless the command has ended."""
        if not self.ended:
            self._signal_group(number)

    def _signal_group(self, number: int) -> bool:
        """Send a signal, 0 for none, to the whole group; return whether any process got it."""
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def reap(self) -> bool:
        """Take the status of the command, if it has ended; return whether it has."""
        if not self.ended:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                # Somebody in this process waits for all children, or ignores SIGCHLD.
                pid, status = -1, 0
            if pid > 0:
                self.status = status and (-os.WTERMSIG(status) if os.WIFSIGNALED(status)
                                          else os.WEXITSTATUS(status))
            if pid != 0:        # never taken back: another thread may have reaped it meanwhile
                self.ended = True
        return self.ended

    def _read_errors(self) -> None:
        """Read what is there of the command's standard error, and keep the head of it."""
        assert self._stderr is not None
        data = os.read(self._stderr, CHUNK)
        self.errors += data[:MAX_ERROR_OUTPUT - len(self.errors)]
        if not data:
            os.close(self._stderr)
            self._stderr, self._pause = None, SHORT_PAUSE   # its end is near

    def _close(self) -> None:
        """Read the rest of the head, unless the command succeeded; close all descriptors."""
        while (self.status != 0 and self._stderr is not None
               and len(self.errors) < MAX_ERROR_OUTPUT and _Watch((self._stderr,)).wait(0)):
            self._read_errors()
        for descriptor in (self._stderr, self._pidfd):
            if descriptor is not None:
                os.close(descriptor)


def _open_input(mail: Mail) -> int:
    """A descriptor for the command to read the mail from: a pipe if that can hold all of it.

    Raises TemporaryFailure if it cannot, and there is no room for it elsewhere.
    """
    if not mail.spool.has_descriptor:
        data = mail.data
        reader, writer = os.pipe()
        try:
            if len(data) > 4096:        # the least that a pipe takes at once anywhere
                os.set_blocking(writer, False)
            if os.write(writer, data) == len(data):
                return reader
        except OSError:     # BlockingIOError is one
            pass
        finally:
            os.close(writer)
        os.close(reader)
    try:
        mail.spool.ensure_descriptor()
    except OSError as error:
        raise TemporaryFailure("No room for the mail now", 452, "4.3.1", [_why(error)]) from None
    descriptor = mail.file.fileno()
    try:        # for reading only, at a position of its own
        return os.open("/proc/self/fd/%d" % descriptor, os.O_RDONLY)
    except OSError:
        return os.dup(descriptor)


class _Starter:
    """Starts programs in sessions of their own, with descriptors 0 to 2, and with the environment
    that there was when it was made. Called with the program, its arguments and these descriptors,
    it returns the process id. Raises OSError.
    """

    def __init__(self, alone: bool) -> None:
        # Name by name, since another thread may change it meanwhile. An empty name is of no use,
        # and os.posix_spawn refuses it.
        self._environment = {name: os.environb.get(name, b"") for name in list(os.environb) if name}
        self._start: Start = self._spawn
        if not alone:
            try:
                self._start = _glibc_spawn(self._environment)
            except (ImportError, AttributeError, OSError, MemoryError):     # no ctypes, or no glibc
                self._start = self._popen

    def __call__(self, program: str, arguments: list[bytes],
                 descriptors: tuple[int, int, int]) -> int:
        stdin, _, stderr = descriptors
        if min(stdin, stderr) < 3:      # one dup2 could overwrite what another is to copy
            raise OSError(errno.EBADF, "one of descriptors 0 to 2 of this process was closed")
        try:
            return self._start(program, arguments, descriptors)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
        # A script without #! is run by the shell, as by execvp(3).
        return self._start("/bin/sh", [b"sh", os.fsencode(program), *arguments[1:]], descriptors)

    def _spawn(self, program: str, arguments: list[bytes],
               descriptors: tuple[int, int, int]) -> int:
        """Needs no import, but makes other threads wait, and closes no descriptor."""
        if _hide_descriptors():
            try:
                return os.posix_spawn(
                    program, arguments, self._environment, setsid=True, setsigmask=(),
                    setsigdef=signal.valid_signals(), file_actions=[
                        (os.POSIX_SPAWN_DUP2, descriptor, number)
                        for number, descriptor in enumerate(descriptors)])
            except (AttributeError, NotImplementedError):   # it is not there, or knows no setsid
                pass
        return self._popen(program, arguments, descriptors)

    def _popen(self, program: str, arguments: list[bytes],
               descriptors: tuple[int, int, int]) -> int:
        import subprocess
        stdin, stdout, stderr = descriptors
        process = subprocess.Popen(arguments, executable=program, stdin=stdin, stdout=stdout,
                                   stderr=stderr, env=self._environment, start_new_session=True)
        process.returncode = 0      # so that subprocess leaves it to us
        return process.pid


def _hide_descriptors() -> bool:
    """Let programs inherit descriptors 0 to 2 only; return whether that could be done."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:         # not Linux
        return False
    for descriptor in map(int, names):
        try:
            os.set_inheritable(descriptor, descriptor < 3)
        except OSError:     # the one that listed the folder, closed by now
            pass
    return True


def _glibc_spawn(environment: dict[bytes, bytes]) -> Start:
    """A Start by posix_spawn(3) of glibc 2.34 or newer; elsewhere it raises what _Starter catches.

    Other threads run while it starts a process, as they do not under subprocess and
    os.posix_spawn: eight clients get half as many mails again delivered.
    """
    import ctypes
    glibc, spawn = ctypes.PyDLL("libc.so.6"), ctypes.CDLL("libc.so.6").posix_spawn
    add_dup2 = glibc.posix_spawn_file_actions_adddup2
    add_close_from = glibc.posix_spawn_file_actions_addclosefrom_np

    def block() -> ctypes.Array[ctypes.c_long]:
        return (ctypes.c_long * 128)()      # larger than each of glibc's structures

    def strings(texts: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
        if b"\0" in b"".join(texts):
            raise ValueError("NUL in an argument")      # it would end there
        return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)

    attributes, none, all_signals = block(), block(), block()
    glibc.sigemptyset(none)
    glibc.sigfillset(all_signals)
    glibc.posix_spawnattr_init(attributes)
    glibc.posix_spawnattr_setflags(attributes, 0x04 | 0x08 | 0x80)  # SETSIGDEF, SETSIGMASK, SETSID
    glibc.posix_spawnattr_setsigdefault(attributes, all_signals)
    glibc.posix_spawnattr_setsigmask(attributes, none)
    variables = strings([b"%b=%b" % variable for variable in environment.items()])

    def start(program: str, arguments: list[bytes], descriptors: tuple[int, int, int]) -> int:
        actions, pid, words = block(), ctypes.c_int(), strings(arguments)
        error = glibc.posix_spawn_file_actions_init(actions)
        for number, descriptor in enumerate(descriptors):
            error = error or add_dup2(actions, descriptor, number)
        error = error or add_close_from(actions, 3) or spawn(
            ctypes.byref(pid), os.fsencode(program), actions, attributes, words, variables)
        glibc.posix_spawn_file_actions_destroy(actions)
        if error:
            raise OSError(error, os.strerror(error), program)
        return pid.value
    return start


def find_program(name: str) -> str | None:
    """The path of a program, None where there is none that can be executed.

    As shutil.which has it, whose import would cost inetd users some milliseconds.
    """
    places = [""] if "/" in name else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for path in (os.path.join(place, name) for place in places):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def smtpd_handler(process_message: Callable[..., str | None], *,
                  decode_data: bool = False) -> Deliver:
    """The `deliver` that calls a `process_message` written for the removed module smtpd.

    It is called as ``process_message(peer, mailfrom, rcpttos, data, mail_options=[...],
    rcpt_options=[])`` with the data as bytes, its lines joined by LF; mail_options holds at
    most "SMTPUTF8". With `decode_data`, as there, the data is a str and there are no options. A
    4xx or 5xx reply that it returns, such as "550 No", is what the client is told.
    """
    def deliver(mail: Mail) -> None:
        data, sender = mail.data[:-1], mail.sender or "<>"
        if decode_data:
            reply = process_message(mail.peer, sender, mail.recipients, data.decode())
        else:
            reply = process_message(mail.peer, sender, mail.recipients, data, rcpt_options=[],
                                    mail_options=["SMTPUTF8"] if mail.smtputf8 else [])
        # Of several lines, such as "550-No" and "550 Never", all but the first drop the code.
        text = re.sub(r"\r?\n(?:[45][0-9]{2}[- ])?", " ", (reply or "").rstrip())
        match = re.match(r"(([45])[0-9]{2})-? *(?:(\2(?:\.[0-9]{1,3}){2})\b)? *(.*)", text)
        if match:
            failure = TemporaryFailure if match.group(2) == "4" else PermanentFailure
            raise failure(match.group(4), int(match.group(1)), match.group(3))
    return deliver


# ---------------------------------------------------------------------------------------------
# Serving
# ---------------------------------------------------------------------------------------------

def _require_server_context(context: object) -> None:
    """Raise ValueError for what no server can do a handshake with: clients would be told of TLS."""
    import ssl
    if not isinstance(context, ssl.SSLContext) or context.protocol == ssl.PROTOCOL_TLS_CLIENT:
        raise ValueError("tls has to be a context for servers, such as "
                         "ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), not %r" % (context,))


class Server:
    """An SMTP server on one or more sockets, with a thread for each session.

    deliver(mail): called with each Mail, from the thread of its session, so from up to
    `max_sessions` at a time. The client hears 250 when it returns, and what a TemporaryFailure or
    PermanentFailure says when it raises one; any other exception is logged and answered 451. It may
    take its time, but most clients give up after ten minutes: RFC 5321 4.5.3.2.6.
    host: an IP address, or a sequence of them. port: 0 for a free one. sockets: listening sockets
    to use instead of these; stop() closes them.
    authenticate(user, password): both str and not empty; a client may send once this returned True.
    All else is answered AUTH_DELAY seconds late, and so is any AUTH for AUTH_MEMORY seconds after
    it (tests may set msmtpd.AUTH_DELAY to 0); an exception is answered 454. If None, nobody has to
    authenticate, or can.
    tls: an ssl.SSLContext for STARTTLS, or with starttls=False for TLS from the first byte.
    check(address, mail): called for the sender, when `mail` has no recipients, and for each
    recipient, then the last one of `mail`; may raise either failure. A Command's own comes first.
    session: the class of the sessions. received: whether mails get a Received line. max_size:
    bytes of a mail, 0 for any number. max_sessions: served at a time. timeout: seconds that a
    client may be silent. log: a logging.Logger, that named "msmtpd" if None.

    Once started, `host` and `port` are those of the first socket, `addresses` those of all.
    Raises TypeError and ValueError for arguments that make no sense.
    """

    def __init__(self, deliver: Deliver, host: str | Sequence[str] = "127.0.0.1",
                 port: int = 0, *, authenticate: Authenticate | None = None,
                 tls: ssl.SSLContext | None = None, starttls: bool = True,
                 check: Check | None = None, session: type[Session] = Session,
                 received: bool = False, max_size: int = MAX_SIZE,
                 max_sessions: int = MAX_SESSIONS, timeout: float = TIMEOUT,
                 sockets: Sequence[socket.socket] = (), log: Log | None = None) -> None:
        self._hosts = [host] if isinstance(host, str) else list(dict.fromkeys(host))
        if not callable(deliver):
            raise TypeError("deliver has to be a function of one mail, not %r" % (deliver,))
        for makes_sense, wanted in (
                (self._hosts and all(isinstance(address, str) for address in self._hosts),
                 "host has to be an IP address, or a sequence of them"),
                (port in range(65536), "port has to be a number from 0 to 65535"),
                (authenticate is None or callable(authenticate),
                 "authenticate has to be a function of user and password"),
                (starttls or tls, "starttls=False needs tls"),
                (check is None or callable(check),
                 "check has to be a function of address and mail"),
                (max_size >= 0, "max_size has to be 0 or more"),
                (max_sessions > 0, "max_sessions has to be 1 or more"),
                (timeout > 0, "timeout has to be more than 0"),
                (log is None or hasattr(log, "isEnabledFor"), "log has to be a logging.Logger")):
            if not makes_sense:
                raise ValueError(wanted)
        if tls is not None:
            _require_server_context(tls)
        self.host, self.port = self._hosts[0], port
        self.addresses: list[Peer] = []
        self._port, self._sockets = port, sockets
        checks: tuple[Check, ...] = () if check is None else (check,)
        if isinstance(deliver, Command):        # so that MAIL and RCPT already refuse
            checks = (deliver.check, *checks)
        self._settings = Settings(deliver, checks, tls, starttls, received, max_size, timeout)
        self._authenticate = authenticate
        self._session, self._max_sessions = session, max_sessions
        self._log = _library_log() if log is None else log
        self._numbers = itertools.count(1)
        self._slots: Slots | None = None            # while it is started
        self._workers: _Workers | None = None
        self._forever = False                       # somebody is in serve_forever

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context of sessions that begin from now on. Another one may be set at any time."""
        context: ssl.SSLContext | None = self._settings.tls
        return context

    @tls.setter
    def tls(self, context: ssl.SSLContext) -> None:
        _require_server_context(context)
        self._settings = self._settings._replace(tls=context)

    def __enter__(self) -> Server:
        if not self._slots or self._slots.drain_until is not None:
            self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and serve, in threads of the server's own; the port is known on return.

        Raises OSError if it cannot listen, also for a host that is no IP address, RuntimeError if
        it is started already, and RuntimeError or MemoryError if no thread is to be had.
        """
        import contextlib
        import socket
        if self._slots and self._slots.drain_until is None:
            raise RuntimeError("the server has been started already")
        with contextlib.ExitStack() as opened:
            sockets = []
            for listener in self._sockets or _listen(self._hosts, self._port):
                sockets.append(opened.enter_context(listener))
                listener.setblocking(False)
                # Inherited by connections, where otherwise a second small reply might wait 40 ms.
                try:
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                except OSError:     # a Unix socket has no delay
                    pass
            addresses = [peer_of(listener.getsockname()) for listener in sockets]
            slots = Slots(*socket.socketpair())
            opened.callback(slots.close)
            # Not by its truth: an object, such as a table that is still empty, may be false.
            authenticator = (None if self._authenticate is None
                             else Authenticator(self._authenticate))
            listeners = _Listeners(slots.descriptor, sockets, self._log)
            opened.callback(listeners.close)
            workers = _Workers(
                listeners, slots, self._max_sessions, self._log,
                lambda client, name: self._serve(client, name, slots, authenticator))
            opened.callback(workers.join)
            opened.callback(slots.drain, 0.0, 1.0)
            workers.start()
            self._slots, self._workers = slots, workers
            opened.pop_all()
        self.addresses = addresses
        if addresses[0].host:
            self.host, self.port = addresses[0]

    def drain(self, grace: float, patience: float) -> None:
        """Begin to stop, and return at once, as a signal handler has to; stop() waits for the end.

        Idle sessions end now, those that receive mail data within `grace` seconds; a `deliver` that
        still runs `patience` seconds later is left behind. A further call can only shorten this.
        """
        if self._slots:
            self._slots.drain(grace, patience)

    def stop(self, grace: float = 1.0, patience: float = 0.5) -> None:
        """Stop listening, end the sessions as `drain` says, and wait for that. Never hangs.

        grace, patience: in seconds. A `deliver` that does not return in time is logged, and its
        thread left behind. Called in a `deliver`, this waits for nobody.
        """
        slots, workers = self._slots, self._workers     # by the end, a `deliver` may start others
        if slots:
            slots.drain(grace, patience)
            self._finish(slots, workers)

    def _finish(self, slots: Slots, workers: _Workers | None) -> None:
        """Wait for the end of what was started as these."""
        if workers and workers.join():
            if self._slots is slots:
                self._slots = self._workers = None
            if not (workers.left_behind or self._forever):
                slots.close()

    def serve_forever(self, stopping: Callable[[], object] | None = None) -> None:
        """Serve, starting first if need be, until a `stop` or `drain` has ended all sessions.

        `stopping` is called when the end begins. An exception of a signal handler's, such as
        KeyboardInterrupt, comes out of this while the threads still serve: call stop() then.
        """
        if not self._slots:
            self.start()
        slots, workers = self._slots, self._workers
        if not slots:       # stopped since
            return
        self._forever = True
        try:
            watch = _Watch((slots.descriptor,))
            while slots.drain_until is None:
                # In turns: a signal that the kernel gives to another thread does not end this wait.
                watch.wait(0.5)
        finally:
            self._forever = False
        try:
            if stopping:
                stopping()
        finally:
            self._finish(slots, workers)

    def serve_descriptors(self, source: int = 0, sink: int = 1) -> bool:
        """Serve one client on two descriptors, in this thread, as inetd wants it.

        Returns whether all went well: no 421, no transaction cut off, each mail delivered.
        """
        reader, writer = os.pipe()
        slots = self._slots = Slots(io.FileIO(reader), io.FileIO(writer, "w"))
        try:
            wire = Wire.of_descriptors(source, sink, slots, self._settings.timeout)
            # Always late, since no memory of failures outlives this process.
            authenticator = (None if self._authenticate is None
                             else Authenticator(self._authenticate, True))
            return self._session(wire, self._settings, authenticator, self._log, 1,
                                 _peer_behind(source)).run()
        finally:
            self._slots = None
            slots.close()

    def _serve(self, client: socket.socket, name: object, slots: Slots,
               authenticator: Authenticator | None) -> None:
        """Serve one client to the end."""
        wire = Wire.of_socket(client, slots, self._settings.timeout)
        self._session(wire, self._settings, authenticator, self._log, next(self._numbers),
                      peer_of(name)).run()


class _Listeners:
    """The sockets on which a server's threads wait for clients; each client wakes only one thread.

    epoll(7) sees to that on Linux. Elsewhere one of the threads waits, the others for their turn.
    """

    def __init__(self, stop: int, sockets: Sequence[socket.socket], log: Log) -> None:
        import contextlib
        import threading
        self._log, self._stop = log, stop
        self._pause = 0.0       # seconds to wait after the last try, if that failed
        self._sockets = {listener.fileno(): listener for listener in sockets}
        self._watch = _Watch((stop, *self._sockets))
        self._closing = threading.Lock()        # not _turn, which a fork may copy as held
        self._turn: ContextManager[object] = threading.Lock()
        try:
            self._epoll: select.epoll | None = select.epoll()
            self._once = select.EPOLLIN | select.EPOLLONESHOT
            self._epoll.register(stop, select.EPOLLIN)
            for descriptor in self._sockets:
                self._epoll.register(descriptor, self._once)
            self._turn = contextlib.nullcontext()       # anybody's
        except (AttributeError, OSError):
            self._epoll = None

    def accept(self) -> tuple[socket.socket, object] | None:
        """Wait, and return a client and its address; None if it is to be called again."""
        ready: Collection[int] = self._sockets      # to be armed again: all, until poll says which
        with self._turn:
            try:
                ready = dict(self._epoll.poll(None, 1)) if self._epoll else self._watch.wait(None)
                for descriptor in ready:
                    if descriptor in self._sockets and self._stop not in ready:
                        accepted = self._sockets[descriptor].accept()
                        self._pause = 0.0
                        return accepted
            except (BlockingIOError, ConnectionAbortedError):       # the client has left
                pass
            except Exception as error:      # descriptors or memory are short, which passes
                is_first, self._pause = not self._pause, min(2 * self._pause, 1.0) or 0.1
                if is_first:
                    _report(self._log, ERROR, "cannot accept, will try again: %s", _why(error))
                time.sleep(self._pause or 0.1)      # nobody else tries meanwhile
            finally:
                for descriptor in ready:
                    if self._epoll and descriptor in self._sockets:
                        self._epoll.modify(descriptor, self._once)      # for the next thread
        return None

    def close(self) -> None:
        """Stop listening. Nobody may be in `accept`."""
        with self._closing:     # or a second caller would return before the first has closed them
            for listener in self._sockets.values():
                listener.close()
        if self._epoll:
            self._epoll.close()


class _Workers:
    """The threads of a server from its start to its stop.

    Each accepts a client and serves it: so a client is not handed over to another thread, and one
    for whom no thread is free stays in the listen queue.
    """

    def __init__(self, listeners: _Listeners, slots: Slots, number: int, log: Log,
                 serve: Callable[[socket.socket, object], None]) -> None:
        import threading
        self._listeners, self._slots, self._log, self._serve = listeners, slots, log, serve
        self._number = number
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()   # held while they are started
        self._waiting: set[int] = set()     # the numbers of those that wait for a client
        slots.waiting = self._waiting
        self.left_behind = 0                # how many threads did not end

    def start(self) -> None:
        """Start as many threads as are to be had. Raises RuntimeError or MemoryError if none is.

        All of them now: once memory has become short, a start may wait for ever.
        """
        import threading
        with self._starting:        # each thread waits until this is done
            for number in range(self._number):
                try:
                    self._threads.append(threading.Thread(
                        target=self._work, args=(number,), daemon=True,
                        name="msmtpd-%d" % (number + 1)))
                    self._threads[number].start()
                except (RuntimeError, MemoryError) as error:
                    if number == 0:
                        raise
                    # Only half of these: the commands need processes, which are as scarce.
                    self._number = (number + 1) // 2
                    del self._threads[self._number:]
                    _report(self._log, ERROR, "no more than %d sessions at a time: %s",
                            self._number, _why(error))
                    return

    def join(self) -> bool:
        """Stop listening and wait for the threads, as long as `drain` allows.

        Returns False, without waiting for their end, if called in one of them.
        """
        import threading
        # Threads that wait for a client will cease to; after a fork they are in the other process.
        while self._waiting and not self._slots.is_copy():
            time.sleep(0.001)
        self._listeners.close()
        if threading.current_thread() in self._threads:
            return False        # stop() in a deliver waits for nobody
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < self._slots.leave_at:
                # In turns, as in serve_forever.
                thread.join(max(0.0, min(0.5, self._slots.leave_at - time.monotonic())))
        self.left_behind = sum(thread.is_alive() for thread in self._threads)
        if self.left_behind:
            _report(self._log, ERROR, "left behind: %d sessions, which do not end",
                    self.left_behind)
        return True

    def _work(self, number: int) -> None:
        """What each thread does: accept a client, serve it, and again, until the server stops."""
        with self._starting:
            if number >= self._number:
                return
        while True:
            try:
                self._waiting.add(number)   # first: `join` looks for it once the server stops
                try:
                    if self._slots.drain_until is not None:
                        return
                    accepted = self._listeners.accept()
                finally:
                    self._waiting.discard(number)
                if accepted:
                    with accepted[0]:
                        self._serve(*accepted)
            except BaseException:
                _report(self._log, ERROR, "a session ended by an error", exc_info=True)
                time.sleep(0.1)     # in case it recurs at once


def peer_of(name: object) -> Peer:
    """The Peer that a socket's address stands for."""
    if not (isinstance(name, tuple) and isinstance(name[0], str)):
        return Peer(None, None)     # a Unix or VM socket's
    host = name[0]
    return Peer(host[7:] if host.startswith("::ffff:") and "." in host else host, name[1])


def _peer_behind(descriptor: int) -> Peer:
    """The Peer at the other end of a descriptor, Peer(None, None) if there is none."""
    import stat
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return Peer(None, None)
    import socket
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        try:
            return peer_of(connection.getpeername())
        except OSError:
            return Peer(None, None)


def _listen(hosts: Sequence[str], wanted: int, tries: int = 8) -> list[socket.socket]:
    """Return sockets that listen on each of `hosts`, at port `wanted` or, if 0, one free on all."""
    import contextlib
    import socket
    hosts, port = list(hosts), wanted
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        for host in hosts:
            try:
                info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
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


def _library_log() -> logging.Logger:
    """The logger "msmtpd", which prints nothing unless somebody wants it to."""
    import logging
    log = logging.getLogger("msmtpd")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return log


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

HELP = """\
usage: msmtpd [option...]

msmtpd hands each mail that it gets by SMTP to a command. The first %F in the
command becomes the sender; the recipients are appended as arguments.

service:
  --inetd                    serve one client on standard input and output
  --interface=IP             listen on this address (127.0.0.1), repeatable
  --port=NUMBER              listen on this port (25), 0 for a free one
  --command=CMD              pipe mails to this (msmtp -f %F --)
  --received=on|off          begin mails with a Received line (on)

log:
  --log=none|syslog|FILE     log to this (none), - is standard error
  --debug                    log the dialogues, without secrets

security:
  --auth=USER[,PASSWORDEVAL] let only this user send; the password is that
                             command's output, or in the key ring, or asked for
  --tls-cert-file=FILE       offer TLS with this certificate
  --tls-key-file=FILE        its key, if not in the same file
  --tls-starttls=on|off      TLS by STARTTLS (on), or from the first byte

limits:
  --max-size=BYTES           of a mail (64M), 0 for none; K, M, G may follow
  --max-sessions=NUMBER      at a time (16), further clients wait
  --timeout=SECONDS          for a client's silence (300)
  --delivery-timeout=SECONDS for a run of the command (540)

information:
  --help                     print this summary
  --version                  print the version

Exit status: 0 stopped as asked; 1 stopped by a second signal, or the one
session under inetd went wrong; 3 could not start. The manual is msmtpd.1.
"""


class StartError(Exception):
    """Why the program cannot start, and what to do about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments, sys.argv's if None; return its exit status."""
    if sys.version_info < (3, 8):
        _tell("needs Python 3.8 or newer")
        return 3
    options, mistakes = _read_options(sys.argv[1:] if argv is None else argv)
    _settle(options.inetd)
    log: Log = ErrorsOnly()
    try:
        if options.help or options.version:
            print(HELP if options.help else "msmtpd.py " + __version__ + "\n", end="", flush=True)
            return 0
        log = _open_log(options.log, options.debug)
        if mistakes:
            raise StartError(mistakes[0] + "; see --help")
        return (_run_inetd if options.inetd else _run_daemon)(options, log)
    except (StartError, OSError, ImportError, KeyboardInterrupt, EOFError) as error:
        text = " ".join(str(error).split()) or "interrupted before the start"
        _report(log, ERROR, "%s", text)
        if options.inetd:
            try:
                os.write(1, b"421 4.3.0 Cannot start; the log, if there is one, says why\r\n")
            except OSError:     # the client has left
                pass
        elif options.log != "-" and not isinstance(log, ErrorsOnly):
            _tell(text)
        return 3


def _settle(inetd: bool) -> None:
    """Put in order what commands inherit: descriptors 0 to 2, PATH, signals."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:         # closed, so the next file opened would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Under inetd standard error is the client, too, and what is written there is not meant for it.
    if inetd and any(os.path.sameopenfile(2, descriptor) for descriptor in (0, 1)):
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    os.environ.setdefault("PATH", DEFAULT_PATH)
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Python itself ignores these two, and they are restored for what is started. If SIGCHLD
        # were ignored, exit statuses would be lost.
        for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def _read_options(arguments: Sequence[str]) -> tuple[types.SimpleNamespace, list[str]]:
    """Read the options, named as in OPTIONS, with _ for -; return them, and what is wrong.

    The rules are those of getopt_long(3). The modules getopt and argparse end at the first mistake,
    but later options may say whether there is a client to tell of it, and where the log is.
    """
    import types
    options = types.SimpleNamespace(**{
        name.replace("-", "_"): default for name, (default, _) in OPTIONS.items()})
    mistakes = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            mistakes += ["unknown argument " + argument for argument in words]
            break
        try:
            name, value = _read_option(word, words)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        if name == "interface":
            value = (*options.interface, value)
        setattr(options, name.replace("-", "_"), value)
    if not options.tls_cert_file and (options.tls_key_file or not options.tls_starttls):
        mistakes.append("TLS needs --tls-cert-file, too")
    if options.debug and options.log == "none":
        options.log = "-"
    return options, mistakes


def _read_option(word: str, words: Iterator[str]) -> tuple[str, object]:
    """Read an option; return its name and value, which may be the next of `words`.

    Raises ValueError saying what is wrong.
    """
    name, equals, text = word[2:].partition("=")
    if not (word.startswith("--") and name):
        raise ValueError("unknown argument %s; options begin with --, and a value with spaces "
                         "needs quotes" % word)
    near = [name] if name in OPTIONS else [known for known in OPTIONS if known.startswith(name)]
    if len(near) != 1:
        try:
            import difflib
            near = near or difflib.get_close_matches(name, OPTIONS, 1, 0.5)
        except ImportError:     # Debian's python3-minimal has none
            pass
        raise ValueError("unknown option --%s%s" % (
            name, "; did you mean --%s?" % " or --".join(near) if near else ""))
    name = near[0]
    read = OPTIONS[name][1]
    if read is None:
        if equals:
            raise ValueError("--%s takes no value" % name)
        return name, True
    text = text if equals else next(words, "")
    if not text:
        raise ValueError("--%s needs a value" % name)
    try:
        return name, read(text)
    except ValueError as error:
        raise ValueError("--%s: %s" % (name, error)) from None


def _auth(value: str) -> tuple[str, str]:
    user, comma, command = value.partition(",")
    if not user or comma and not command:
        raise ValueError("write USER, or USER,COMMAND")
    return user, command


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("write on or off")
    return value == "on"


def _port(value: str) -> int:
    if not (value.isdecimal() and int(value) <= 65535):
        raise ValueError("%r is not a port number, 0 to 65535" % value)
    return int(value)


def _count(value: str) -> int:
    if not (value.isdecimal() and int(value) > 0):
        raise ValueError("%r is not a number of 1 or more" % value)
    return int(value)


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) or not 0 < float(value) < 1e9:
        raise ValueError("%r is not a number of seconds, above 0 and below 1000000000" % value)
    return float(value)


def _size(value: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", value.upper())
    if not match:
        raise ValueError("%r is not a size, such as 500K, 64M or 0" % value)
    factor: int = 1024 ** " KMG".index(match.group(2) or " ")
    return int(match.group(1)) * factor


# The default of each option, and the function that reads its value or raises ValueError; None for
# an option that takes no value.
OPTIONS: dict[str, tuple[object, Callable[[str], object] | None]] = {
    "inetd": (False, None), "interface": ((), str), "port": (25, _port),
    "command": ("msmtp -f %F --", str), "received": (True, _switch),
    "log": ("none", str), "debug": (False, None),
    "auth": (None, _auth), "tls-cert-file": (None, str), "tls-key-file": (None, str),
    "tls-starttls": (True, _switch),
    "max-size": (MAX_SIZE, _size), "max-sessions": (MAX_SESSIONS, _count),
    "timeout": (TIMEOUT, _seconds), "delivery-timeout": (DELIVERY_TIMEOUT, _seconds),
    "help": (False, None), "version": (False, None),
}


def _open_log(target: str, debug: bool) -> Log:
    """The log that --log names. Raises StartError where it cannot be opened."""
    if target == "none":
        return ErrorsOnly()
    import logging
    import logging.handlers

    class LowerCase(logging.Formatter):
        """Knows two levels, "info" and "error"."""

        def format(self, record: logging.LogRecord) -> str:
            record.level = "error" if record.levelno >= logging.ERROR else "info"
            return super().format(record).encode("utf-8", "backslashreplace").decode()

    class Syslog(logging.Handler):
        """The syslog of the C library, which reconnects, and never fails."""

        def emit(self, record: logging.LogRecord) -> None:
            priority = syslog.LOG_ERR if record.levelno >= logging.ERROR else syslog.LOG_INFO
            for line in self.format(record).splitlines():
                syslog.syslog(priority, line.replace("\0", "?"))

    handler: logging.Handler
    if target == "syslog":
        try:
            import syslog
        except ImportError:
            raise StartError("this system has no syslog; use --log=FILE") from None
        syslog.openlog("msmtpd", syslog.LOG_PID, syslog.LOG_MAIL)
        handler = Syslog()
        handler.setFormatter(LowerCase("%(level)s: %(message)s"))
    else:
        try:
            handler = (logging.handlers.WatchedFileHandler(target, encoding="utf-8")
                       if target != "-" else
                       logging.StreamHandler(open(2, "w", encoding="utf-8", closefd=False)))
        except OSError as error:
            raise StartError("cannot open the log %s: %s" % (target, error.strerror)) from None
        handler.setFormatter(LowerCase("%(asctime)s msmtpd[%(process)d] %(level)s: %(message)s",
                                       "%Y-%m-%d %H:%M:%S"))
    logging.raiseExceptions = False     # a log that fails must not fill standard error
    log = _library_log()
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    return log


def _find_password(user: str, command: str, inetd: bool) -> str:
    """The password of --auth, looked up once. Raises StartError saying what was tried."""
    if command:
        return _evaluate(command, inetd)
    tried = []
    for password, why_not in _look_up(user, inetd):
        if password:
            return password
        tried.append(why_not)
    raise StartError("no password for %s: %s; store one with \"secret-tool store --label=msmtpd "
                     "host localhost service smtp user %s\", or give a command that prints it: "
                     "--auth=%s,COMMAND" % (user, ", ".join(tried), user, user))


def _look_up(user: str, inetd: bool) -> Iterator[tuple[str, str]]:
    """Look in one place after the other; yield the password, or "" and why it is not there."""
    yield _run_lookup("secret-tool", "lookup", "host", "localhost", "service", "smtp",
                      "user", user)
    yield _ask_keyring(user)
    if sys.platform == "darwin":
        yield _run_lookup("security", "find-internet-password", "-s", "localhost", "-r", "smtp",
                          "-a", user, "-w")
    yield ("", "no prompt under inetd") if inetd else _ask_terminal(user)


def _evaluate(command: str, inetd: bool) -> str:
    """The first line of what `command` prints."""
    import subprocess
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=False,
                          stdin=subprocess.DEVNULL if inetd else None)
    if done.returncode:
        raise StartError("the password command of --auth failed, with exit status %d"
                         % done.returncode)
    try:
        password = _first_line(done.stdout)
    except UnicodeDecodeError:
        raise StartError("the password command of --auth printed text that is not UTF-8") from None
    if not password:
        raise StartError("the password command of --auth printed no password")
    return password


def _first_line(output: bytes) -> str:
    """The first line without its end. Raises UnicodeDecodeError where it is not UTF-8."""
    return output.split(b"\n")[0].rstrip(b"\r").decode()


def _run_lookup(*arguments: str) -> tuple[str, str]:
    """The first line that a look-up program prints, or why there is none."""
    import subprocess
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60, check=False)
        password = "" if done.returncode else _first_line(done.stdout)
    except FileNotFoundError:
        return "", "no program %s" % arguments[0]
    except UnicodeDecodeError:      # whose text would show some of the password
        return "", "%s: its output is not UTF-8" % arguments[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", "%s: %s" % (arguments[0], error)
    errors = done.stderr.decode("utf-8", "replace").strip()
    why_not = _shown(errors.split(": ", 1)[-1]) or "no such entry, or the key ring is locked"
    return password, "%s: %s" % (arguments[0], why_not)


def _ask_keyring(user: str) -> tuple[str, str]:
    try:
        import keyring  # type: ignore[import-not-found, unused-ignore]
        return keyring.get_password("smtp://localhost", user) or "", "keyring: no such entry"
    except ImportError:
        return "", "no Python package keyring"
    except Exception as error:      # each of its back ends raises its own
        return "", "keyring: %s" % _shown(_why(error))


def _ask_terminal(user: str) -> tuple[str, str]:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:     # without it, getpass would ask on standard input
        return "", "no terminal to ask on"
    import getpass
    try:
        return getpass.getpass("Password of %s: " % user), "none was typed"
    except EOFError:
        return "", "none was typed"
    except UnicodeDecodeError:      # as in _run_lookup
        return "", "what was typed is not UTF-8"


def _tls_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """A context for TLS 1.2 and newer. Raises StartError where the files are not in order."""
    try:
        import ssl
    except ImportError:
        raise StartError("this Python has no ssl module, and so no TLS") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if ssl.HAS_TLSv1_3:
        # Clients that use libesmtp take a ticket for the reply that they wait for, and hang.
        context.num_tickets = 0

    def refuse() -> str:
        raise StartError("the key in %s is encrypted; decrypt it first, with "
                         "\"openssl pkey -in KEY -out FILE\"" % (key or certificate))
    parts = ((certificate, b"CERTIFICATE"), (key or certificate, b"PRIVATE KEY"))
    for name, _ in parts:
        try:
            open(name, "rb").close()
        except OSError as error:
            raise StartError("cannot read %s: %s" % (name, error.strerror)) from None
    try:
        context.load_cert_chain(certificate, key, refuse)
    except OSError as error:            # ssl.SSLError is one
        for name, part in parts:
            if os.path.isfile(name) and not _holds(name, part):
                raise StartError("there is no %s in %s, in PEM format; if it is in another file, "
                                 "name that with --tls-cert-file or --tls-key-file"
                                 % (part.decode().lower(), name)) from None
        raise StartError("cannot use the certificate in %s with the key in %s: %s" % (
            certificate, key or certificate, re.sub(r" \(_ssl\.c.*", "", str(error)))) from None
    return context


def _holds(name: str, part: bytes) -> bool:
    """Whether a file holds `part` in PEM format (RFC 7468), near its beginning."""
    with open(name, "rb") as file:
        return part + b"-----" in file.read(MAX_MEMORY)


def _make_server(options: types.SimpleNamespace, log: Log,
                 stdout: int | None) -> tuple[Server, Command]:
    """The server that the options describe, and the command it delivers to."""
    sockets = _inherited_sockets(options.inetd)
    try:
        command = Command(options.command, timeout=options.delivery_timeout, stdout=stdout,
                          alone=options.inetd)
    except ValueError as error:
        raise StartError("bad --command: %s" % error) from None
    authenticate = tls = None
    if options.tls_cert_file:
        tls = _tls_context(options.tls_cert_file, options.tls_key_file)
    if options.auth:
        user = options.auth[0]
        authenticate = one_user(user, _find_password(user, options.auth[1], options.inetd))
    server = Server(command, options.interface or "127.0.0.1", options.port,
                    authenticate=authenticate, tls=tls, starttls=options.tls_starttls,
                    received=options.received, max_size=options.max_size,
                    max_sessions=options.max_sessions, timeout=options.timeout,
                    sockets=sockets, log=log)
    for text in command.warnings:
        _warn(log, options, text)
    return server, command


def _warn(log: Log, options: types.SimpleNamespace, text: str) -> None:
    """Say, on standard error and in the log, what may be wrong."""
    _report(log, INFO, "warning: %s", text)
    if options.log != "-":
        _tell("warning: %s" % text)


def _run_inetd(options: types.SimpleNamespace, log: Log) -> int:
    """Serve one client on standard input and output."""
    server, command = _make_server(options, log, os.open(os.devnull, os.O_WRONLY))
    _Stop(server, command, options.delivery_timeout)
    return 0 if server.serve_descriptors() else 1


def _run_daemon(options: types.SimpleNamespace, log: Log) -> int:
    """Serve until a signal comes."""
    import gc
    notify = os.environ.pop("NOTIFY_SOCKET", "")
    server, command = _make_server(options, log, None)
    stop = _Stop(server, command, options.delivery_timeout)
    _Reload(server, log, options)
    _start_server(server, options)
    if stop.asked:              # maybe before there was anything to stop
        stop.drain()
    on_terminal = os.isatty(2) and options.log != "-"
    _announce(server, log, options, on_terminal)

    def stopping() -> None:
        _notify(notify, b"STOPPING=1")
        if on_terminal:
            _tell("stopping once the mails under way are delivered; Ctrl-C again stops at once")
    gc.freeze()         # what is there now stays: the collector need not look through it each time
    _notify(notify, b"READY=1")
    server.serve_forever(stopping)
    _report(log, INFO, "stopped")
    return 0


def _start_server(server: Server, options: types.SimpleNamespace) -> None:
    """Start the server. Raises StartError, with a hint at what to do about it."""
    try:
        server.start()
    except (OSError, RuntimeError, MemoryError) as error:
        number = getattr(error, "errno", None) or 0
        hints = {errno.EADDRINUSE: "; end the program that has it, or try another --port",
                 errno.EADDRNOTAVAIL: "; this machine has no such address",
                 errno.EACCES: "; ports below 1024 are for root: try --port=2500"}
        raise StartError("cannot listen on %s port %d: %s%s" % (
            ", ".join(options.interface or ["127.0.0.1"]), options.port,
            os.strerror(number) if number else _why(error), hints.get(number, ""))) from None


def _announce(server: Server, log: Log, options: types.SimpleNamespace, on_terminal: bool) -> None:
    """Say where the server listens, and warn where that asks for more protection."""
    places = " and ".join(str(peer) if peer.host else "a Unix socket"
                          for peer in server.addresses)
    _report(log, INFO, "listening on %s, piping mails to: %s", places, options.command)
    if any(peer.host and peer.host != "::1" and not peer.host.startswith("127.")
           for peer in server.addresses):
        if not options.auth:
            _warn(log, options, "anybody who reaches %s can send mail; use --auth" % places)
        elif not server.tls:
            _warn(log, options, "passwords come to %s unencrypted; use --tls-cert-file" % places)
    if on_terminal and server.addresses[0].host:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
        client = ("nc %s %s" if options.tls_starttls else "openssl s_client -connect [%s]:%s")
        _tell("listening on %s, piping mails to: %s (to try it: %s; to stop it: Ctrl-C)"
              % (places, options.command, client % (host, server.port)))


class _Stop:
    """What SIGTERM, SIGINT and the end of the terminal do: the first ends the server in good
    order, a second SIGTERM or SIGINT at once.
    """

    def __init__(self, server: Server, command: Command, delivery_timeout: float) -> None:
        self._server, self._command = server, command
        # A run takes its limit, and twice the delay if SIGKILL does not end it; a third is spare.
        self._patience = delivery_timeout + 3 * KILL_DELAY
        self.asked = False
        numbers = [signal.SIGTERM, signal.SIGINT]
        if os.isatty(2):        # where SIGHUP is the end of the terminal
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self)

    def __call__(self, number: int, frame: object) -> None:
        if self.asked and number in (signal.SIGTERM, signal.SIGINT):
            self._command.abandon()
            os._exit(1)
        if not self.asked:      # the end of a terminal may be told twice, by the kernel and a shell
            self.asked = True
            self.drain()

    def drain(self) -> None:
        """Begin to stop the server, if it has been started."""
        self._server.drain(GRACE, self._patience)


class _Reload:
    """What SIGHUP does: the log is reopened, and the certificate loaded anew."""

    def __init__(self, server: Server, log: Log, options: types.SimpleNamespace) -> None:
        self._server, self._log, self._options = server, log, options
        self._asked = self._busy = False
        if not os.isatty(2):        # or else it ends the server
            signal.signal(signal.SIGHUP, self)

    def __call__(self, number: int, frame: object) -> None:
        self._asked = True
        if self._busy:      # this signal has interrupted the handling of another
            return
        self._busy = True
        try:
            while self._asked:
                self._asked = False
                self._reload()
        finally:
            self._busy = False

    def _reload(self) -> None:
        _report(self._log, INFO, "SIGHUP")      # which makes the log notice that its file was moved
        if self._options.tls_cert_file:
            try:    # not into the context in use: OpenSSL forbids that, and the new may be unfit
                self._server.tls = _tls_context(self._options.tls_cert_file,
                                                self._options.tls_key_file)
            except StartError as error:
                _report(self._log, ERROR, "kept the certificate: %s", error)


def _inherited_sockets(inetd: bool) -> list[socket.socket]:
    """The sockets that systemd passes (sd_listen_fds(3)). Raises StartError for unfit ones."""
    pid, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if inetd or pid != str(os.getpid()) or not number.isdecimal():
        return []
    import socket
    sockets = []
    for descriptor in range(3, 3 + int(number)):
        try:
            inherited = socket.socket(fileno=descriptor)
            listens = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise StartError("descriptor %d of LISTEN_FDS: %s" % (descriptor, error)) from None
        if not listens:
            raise StartError("descriptor %d of LISTEN_FDS is no listening socket; for Accept=yes "
                             "use --inetd" % descriptor)
        inherited.set_inheritable(False)
        sockets.append(inherited)
    return sockets


def _notify(address: str, state: bytes) -> None:
    """Tell systemd (sd_notify(3)), if it wants to hear."""
    if not address:
        return
    import socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notification:
            notification.sendto(state, "\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        pass


if __name__ == "__main__":
    # At once: Python would first spend milliseconds on freeing what the kernel frees anyway.
    os._exit(main())
