# A worker with vLLM.
#
#   docker build -f scripts/docker/vllm.Dockerfile -t frontline/vllm:0.1.0 .
#
# The engine keeps its own interpreter, /usr/bin/python3, which the pool names (`python:`); Ray and
# Frontline run under theirs. Not built here: there is no GPU on which it could run.
FROM frontline/ingress:0.1.0 AS frontline

FROM vllm/vllm-openai:v0.33.0
USER root
COPY --from=frontline /opt/python /opt/python
COPY --from=frontline /opt/frontline /opt/frontline
RUN id -u 1000 >/dev/null 2>&1 || useradd --uid 1000 --create-home frontline
ENV BASH_ENV=/opt/frontline/environment FRONTLINE_HOME=/opt/frontline/home
USER 1000
WORKDIR /opt/frontline/home
ENTRYPOINT []
