"""The settings of the API and the dashboard, from the environment."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """ETL_ROOT: the root to read, a folder of the project or a URL. ETL_API_URL: where browsers reach the API.
    ETL_DASHBOARD_URL: where they reach the dashboard, for the links to it.
    ETL_API_HOSTS: other names by which the API may be asked, separated by commas. ETL_API_TOKEN: what whoever asks has
    to send; without it only this machine is answered. ETL_API_RATE: requests a second of each client; 0 is any."""

    model_config = SettingsConfigDict(env_prefix="ETL_")

    root: str = "outputs"
    api_url: str = "http://127.0.0.1:8000"
    dashboard_url: str = ""
    api_hosts: str = ""
    api_token: str = ""
    api_rate: float = Field(0, ge=0, allow_inf_nan=False)
