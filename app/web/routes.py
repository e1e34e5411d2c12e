"""All routes of the pages."""

from __future__ import annotations

from fastapi import FastAPI

from app.gateway.services import Services
from app.web.board import add_board_routes
from app.web.login import add_login_routes
from app.web.model_pages import add_model_pages
from app.web.pages import compile_templates
from app.web.static_files import add_static_routes
from app.web.usage import add_usage_pages


def add_web_routes(api: FastAPI, services: Services) -> None:
    """Add every page, and the files that they load."""
    compile_templates()
    add_static_routes(api)
    add_model_pages(api, services)
    add_login_routes(api, services)
    add_board_routes(api, services)
    add_usage_pages(api, services)
