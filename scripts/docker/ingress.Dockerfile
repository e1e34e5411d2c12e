# Frontline without an engine: the head, the ingresses, the Models. The images of the engines take
# their Python and Frontline from it, because Ray wants the same of both on every node.
#
#   docker build -f scripts/docker/ingress.Dockerfile -t frontline/ingress:0.1.0 .
#
# Not built here: there is nothing on which it could run.
FROM python:3.12-slim-bookworm

RUN pip install --no-cache-dir uv && useradd --uid 1000 --create-home frontline
COPY requirements/app.lock /opt/frontline/requirements/app.lock
# A Python that can be copied into any image with a C library of 2017 or newer.
RUN uv python install --install-dir /opt/python 3.12 \
    && uv venv --python "$(echo /opt/python/cpython-3.12*/bin/python3.12)" /opt/frontline/env \
    && uv pip install --python /opt/frontline/env/bin/python --no-deps \
        -r /opt/frontline/requirements/app.lock
COPY app /opt/frontline/app
COPY deployments /opt/frontline/deployments
COPY scripts/activate scripts/haproxy /opt/frontline/scripts/
COPY scripts/docker/leave /opt/frontline/scripts/docker/
RUN printf '#!/opt/frontline/env/bin/python\nfrom app.cli.main import main\n\nmain()\n' \
        >/opt/frontline/env/bin/frontline \
    && chmod +x /opt/frontline/env/bin/frontline \
    && install -d -o 1000 -g 1000 /opt/frontline/home

# KubeRay starts Ray with `bash -c`, which reads this file first: the settings of Ray and HAProxy
# stand in one place.
COPY scripts/docker/environment /opt/frontline/environment
ENV BASH_ENV=/opt/frontline/environment FRONTLINE_HOME=/opt/frontline/home
USER 1000
WORKDIR /opt/frontline/home
