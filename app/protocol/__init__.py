"""The wire formats: what is read from requests and answers, and what is written into them. Pure."""
