"""The files in configs/monitoring, as Python: scraping, rules and the dashboard."""
