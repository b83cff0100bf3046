"""The tables of clicks."""

from etl.lake.table import INT, TEXT, TIME, Column, Table, decimal

_EVENTS = {
    "event_id": Column(TEXT, path="id"),
    "session": Column(TEXT, path="session.id"),
    "user_id": Column(INT, nullable=True, path="user.id", range=(1, None)),
    "device": Column(TEXT, default="unknown", path="session.device", choices=("desktop", "phone", "unknown")),
    "kind": Column(TEXT, choices=("view", "cart", "purchase")),
    "page": Column(TEXT, path="page.path"),
    "price": Column(decimal(9, 2), nullable=True, range=(0, None)),
    "at": TIME,
}
_USERS = {"user_id": INT, "country": TEXT, "plan": Column(TEXT, choices=("free", "paid")), "updated_at": TIME}
events = Table("events", _EVENTS, ("event_id",), time="at", files="events/**/*.json.gz")
users = Table("users", _USERS, ("user_id", "updated_at"))  # a row each time that a user changed
TABLES = {"events": events, "users": users}
