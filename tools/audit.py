"""Look the pinned versions of constraints.txt up in the database of known vulnerabilities (OSV), with pip-audit.

    python tools/audit.py                 # exit code 1 if a version is known to be vulnerable
    python tools/audit.py --ignore CVE-2099-0001 --ignore GHSA-xxxx

pip-audit lives in an environment of its own, .make/audit: the pins of the package do not move for it. Without a connection to the
database nothing is looked up, and the last line says so. Standard library only.
"""
import argparse, socket, subprocess, sys, venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST, TOOL = 'api.osv.dev', 'pip-audit>=2.9,<3'


def reachable(host: str, seconds: float = 5.) -> str:
    "'' if a connection can be made, else why not."
    try: socket.create_connection((host, 443), timeout=seconds).close()
    except OSError as e: return str(e) or type(e).__name__
    return ''


def auditor() -> Path:
    "The command, installed on first use."
    home = ROOT/'.make/audit'
    command = home/'bin/pip-audit'
    if not command.exists():
        venv.create(home, with_pip=True)
        subprocess.run([str(home/'bin/python'), '-m', 'pip', 'install', '-q', TOOL], check=True)
    return command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ignore', action='append', default=[], metavar='ID', help='a finding that does not concern this package; say why in CONTRIBUTING.md')
    parser.add_argument('--check-only', action='store_true', help='only say whether the database answers')
    options = parser.parse_args()
    if why := reachable(HOST):
        print(f'audit: SKIPPED, {HOST} cannot be reached ({why}); no version was looked up'); return 0
    if options.check_only: print('audit: the database answers'); return 0
    try: command = auditor()
    except subprocess.CalledProcessError as e: print(f'audit: SKIPPED, pip-audit could not be installed ({e})'); return 0
    ignored = [a for i in options.ignore for a in ('--ignore-vuln', i)]
    done = subprocess.run([str(command), '--vulnerability-service', 'osv', '--requirement', str(ROOT/'constraints.txt'), '--no-deps', '--disable-pip', '--progress-spinner', 'off', *ignored])
    print(f'audit: {"no known vulnerability" if done.returncode == 0 else "see above"} ({HOST})')
    return done.returncode


if __name__ == '__main__': sys.exit(main())
