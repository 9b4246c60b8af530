# Two images of one file:
#   docker build --target cpu  -t endprompt:cpu  .
#   docker build --target cuda -t endprompt:cuda .     (run with --gpus all)
# BASE is any image with `python` 3.11 or 3.12 and pip; REVISION is what runs note as their revision.
ARG BASE=python:3.11-slim

FROM ${BASE} AS wheel
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE} AS common
ARG REVISION=""
ENV ENDPROMPT_REVISION=${REVISION} HF_HOME=/cache/huggingface ENDPROMPT_CACHE=/cache/endprompt PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 user && mkdir -p /work /cache && chown user /work /cache
WORKDIR /work
ENTRYPOINT ["endprompt"]
CMD ["--help"]

FROM common AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
COPY --from=wheel /dist /tmp/dist
RUN python -m pip install --no-cache-dir --constraint /tmp/constraints.txt --index-url ${TORCH_INDEX} torch \
 && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/dist/*.whl && rm -r /tmp/dist
USER 1000

# torch's own wheels bring CUDA; the host brings the driver. Triton compiles a stub, for which it takes gcc.
FROM common AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
COPY --from=wheel /dist /tmp/dist
RUN python -m pip install --no-cache-dir --constraint /tmp/constraints.txt torch \
 && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/dist/*.whl)[cuda]" \
 && rm -r /tmp/dist
USER 1000
