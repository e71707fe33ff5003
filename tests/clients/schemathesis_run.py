"""Schemathesis, all checks, on a worker's own OpenAPI document: python schemathesis_run.py URL CASES FOLDER

CASES is the least number of requests that must have been generated.
"""

import pathlib
import re
import subprocess
import sys

url, cases, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
here = pathlib.Path(__file__).parent
program = pathlib.Path(sys.executable).with_name("st")
examples = max(1, cases // 30)
command = [
    program, "--config-file", here / "schemathesis.toml", "run", f"{url}/openapi.json", "--checks", "all",
    "--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", "1", "--continue-on-failure", "--request-timeout", "60",
    # It would end the worker under test; a test of its own does that.
    "--exclude-path", "/shutdown",
]
result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
(folder / "report.txt").write_text(result.stdout + result.stderr)
print(result.stdout[-6000:], result.stderr[-2000:])
found = re.search(r"(\d+) generated", result.stdout)
generated = int(found.group(1)) if found else 0
if generated < cases:
    sys.exit(f"only {generated} cases, expected {cases}")
sys.exit(result.returncode)
