"""The engine: notebooks run as jobs, and a lake that loses nothing and doubles nothing. It knows no table."""
