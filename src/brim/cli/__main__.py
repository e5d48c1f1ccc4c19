from brim.cli import run

run()
