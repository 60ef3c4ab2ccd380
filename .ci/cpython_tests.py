#!/usr/bin/env python3
"""CPython's own tests of smtplib and of logging's SMTPHandler, with msmtpd.py in smtpd's place.

Says of each class how many passed, and ends with 1 where it is fewer than it should be. The others
want its words and buffers, or replies that this server is not told to give.
"""
import base64
import hmac
import importlib
import os
import sys
import unittest
import warnings
from unittest import mock

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import msmtpd

CASES = (   # the class, how many of it have to pass, and what stands in for what in its module
    ("smtplib", "DebuggingServerTests", 10, "smtpd.DebuggingServer", ()),
    ("smtplib", "SMTPSimTests", 18, "SimSMTPServer", ()),
    ("smtplib", "SMTPUTF8SimTests", 4, "SimSMTPUTF8Server", ("SMTPUTF8", "8BITMIME")),
    ("logging", "SMTPHandlerTest", 1, "TestSMTPServer", ()))


class Simulated(msmtpd.Session):
    """Does what the tests of smtplib tell their simulated server to do."""

    mail_response, disconnect, rcpt_count, rset_count = None, False, 0, 0   # set by tests

    def extensions(self):
        return ["EXPN", "SIZE 20000000", "STARTTLS", "DELIVERBY", *self.server.features, "HELP"]

    def greet(self):
        self.server._SMTPchannel = self     # where the tests look for it
        return super().greet()

    def do_AUTH(self, argument):
        if argument != "CRAM-MD5":
            reply = super().do_AUTH(argument)
            reply.enhanced, reply.lines = "", ["Authentication Succeeded"]
            return reply
        challenge = base64.b64decode(self.server.tests.sim_cram_md5_challenge)
        digest = hmac.HMAC(self.server.tests.sim_auth[1].encode(), challenge, "md5").hexdigest()
        right = self.ask(challenge).split()[1].decode() == digest
        return msmtpd.Reply(235 if right else 535, "", "Authentication Succeeded")

    def do_MAIL(self, argument):
        if self.mail_response and self.disconnect:
            self.send(msmtpd.Reply(451, "", "Aborted"))
            self.flush()
            return self.close()
        if self.mail_response:
            return msmtpd.Reply(421, "", "Closing")
        return super().do_MAIL(argument) and msmtpd.Reply(250, "", "OK")

    def do_RCPT(self, argument):
        return super().do_RCPT(argument) and msmtpd.Reply(250, "", "OK")

    def do_DATA(self, argument):
        reply = super().do_DATA(argument)
        return msmtpd.Reply(250, "", "OK") if reply.code == 250 else reply


def in_smtpds_place(tests, features, process_message):
    """What the tests want of a server of smtpd's."""
    def deliver(mail):
        if stand_in.channel_class:      # set by one test, whose class says this
            raise msmtpd.TemporaryFailure("closing", 421)
        stand_in.last_mail_options, stand_in.last_rcpt_options = mail.mail_options, []
        msmtpd.smtpd_handler(process_message or keep, decode_data=not features)(mail)

    def keep(peer, mailfrom, rcpttos, data, **options):
        stand_in._addresses = {"from": mailfrom, "tos": rcpttos}
        stand_in.last_mailfrom, stand_in.last_rcpttos = mailfrom, rcpttos
        stand_in.last_message = data
    stand_in = mock.Mock(tests=tests, features=list(features), channel_class=None)
    stand_in.add_feature = stand_in.features.append
    server = msmtpd.Server(
        deliver, auth_required=False, session=type("", (Simulated,), {"server": stand_in})
        if not process_message else msmtpd.Session,
        authenticate=lambda *words: words == tests.sim_auth)
    server.start()
    stand_in.port, stand_in.stop = server.port, server.stop
    stand_in.socket.getsockname.return_value = (server.host, server.port)
    return stand_in


def serve(server, begun, ended):
    """Stands in for the thread that runs a server of smtpd's."""
    begun.set()
    ended.wait(20)
    server.stop()
    begun.set()


def run(module, case, least, name, features):
    """Run a class of tests; return whether enough of it passed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tests = importlib.import_module("test.test_" + module)
    except (ImportError, unittest.SkipTest) as error:
        print("!! not in this Python: test_%s: %s" % (module, error))
        return True
    printing = object.__new__(tests.smtpd.DebuggingServer).process_message

    def server(address, handler, *rest, **options):
        return in_smtpds_place(tests, features, printing if "." in name else
                               handler if callable(handler) else None)
    result = unittest.TestResult()
    with mock.patch("test.test_%s.%s" % (module, name), server), \
            mock.patch.object(tests, "debugging_server", serve, create=True):
        unittest.defaultTestLoader.loadTestsFromTestCase(getattr(tests, case)).run(result)
    bad = sorted({test.id().rpartition(".")[2] for test, _ in result.errors + result.failures})
    passed = result.testsRun - len(bad)
    print("%s: %d passed%s" % (case, passed, "; not " + ", ".join(bad) if bad else ""))
    return passed >= least


if __name__ == "__main__":
    results = [run(*case) for case in CASES]
    sys.exit(not all(results))
