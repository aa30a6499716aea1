"""Certificates and pre-shared keys for the tests, made with certtool and psktool."""

import shutil
import ssl
import subprocess
from pathlib import Path


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Authority:
    """A CA with a folder of its own."""

    def __init__(self, folder, name):
        self.folder = folder
        folder.mkdir()
        self.key, self.cert = folder / "ca-key.pem", folder / "ca-cert.pem"
        make_key(self.key)
        template = write(folder / "ca.info", f'cn = "{name}"', "ca", "cert_signing_key",
                         "crl_signing_key")
        run("certtool", "--generate-self-signed", "--load-privkey", self.key, "--template",
            template, "--outfile", self.cert)

    def issue(self, folder, role, cn, *more, purpose=None):
        """ca-cert.pem and ROLE-{cert,key}.pem in `folder`, which is made if it is not there."""
        folder.mkdir(exist_ok=True)
        shutil.copy(self.cert, folder / "ca-cert.pem")
        key, cert = folder / f"{role}-key.pem", folder / f"{role}-cert.pem"
        make_key(key)
        lines = [f"cn = {cn}", "organization = fdb-nbd", "signing_key",
                 f"tls_www_{purpose or role}", *more]
        if role == "server":
            lines += ["dns_name = localhost", "ip_address = 127.0.0.1"]
        run("certtool", "--generate-certificate", "--load-ca-certificate", self.cert,
            "--load-ca-privkey", self.key, "--load-privkey", key,
            "--template", write(folder / f"{role}.info", *lines), "--outfile", cert)
        return folder

    def revoke(self, cert, crl):
        template = write(self.folder / "crl.info", "crl_next_update = 10", "crl_number = 1")
        run("certtool", "--generate-crl", "--load-ca-privkey", self.key, "--load-ca-certificate",
            self.cert, "--load-certificate", cert, "--template", template, "--outfile", crl)


def make_key(path):
    run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", path)
    path.chmod(0o600)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


EXPIRED = ('activation_date = "2019-01-01 00:00:00"', 'expiration_date = "2020-01-01 00:00:00"')


class Pki:
    """
    server  what a server is started with       alice   a client of the same CA
    other   a client of another CA              old     one whose certificate has expired
    wrong_purpose  one with a certificate for servers
    """

    def __init__(self, folder):
        self.folder = folder
        self.ca = Authority(folder / "ca", "the CA")
        self.other_ca = Authority(folder / "other-ca", "another CA")
        self.server = self.ca.issue(folder / "server", "server", "localhost")
        self.alice = self.ca.issue(folder / "alice", "client", "alice")
        self.bob = self.ca.issue(folder / "bob", "client", "bob")
        self.old = self.ca.issue(folder / "old", "client", "old", *EXPIRED)
        self.wrong_purpose = self.ca.issue(folder / "wrong", "client", "host", purpose="server")
        self.other = self.other_ca.issue(folder / "other", "client", "mallory")
        shutil.copy(self.ca.cert, self.other / "ca-cert.pem")
        self.psk = self.keys(folder / "keys.psk", "alice", "bob")

    @staticmethod
    def keys(path, *names):
        for name in names:
            run("psktool", "-u", name, "-p", path)
        path.chmod(0o600)
        return path


def context(folder=None, ca=None, **settings):
    """Python's side of a session: the certificate in `folder`, if there is one."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(ca or Path(folder) / "ca-cert.pem")
    if folder and (Path(folder) / "client-cert.pem").exists():
        made.load_cert_chain(Path(folder) / "client-cert.pem", Path(folder) / "client-key.pem")
    for name, value in settings.items():
        setattr(made, name, value)
    return made
