# The compression half, with a GPU where there is one:
#   docker build -f docker/compress.Dockerfile -t edgestill .
#   docker run --gpus all -v "$PWD:/work" edgestill run recipe.yaml
FROM python:3.12-slim
WORKDIR /opt/edgestill
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY runtime runtime
COPY benchmarks benchmarks
COPY compress compress
RUN pip install --no-cache-dir -c constraints.txt '.[compress,rtx]'
WORKDIR /work
ENTRYPOINT ["edgestill"]
