"""`python -m mint_nb` is the command `mint-nb`."""
from mint_nb.cli import app

app()
