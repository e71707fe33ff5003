//! Logs to stderr, and with the feature `otel` spans to an OpenTelemetry collector.

use std::io::IsTerminal;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, registry};

/// Logs go to stderr; `KIGO_LOG` chooses them (`debug`, `kigo::server=trace`, ...).
pub(super) fn init(serving: bool, json: bool) {
    let default = if serving { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("KIGO_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let lines = fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines = if json {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.boxed()
    };
    let registry = registry().with(lines.with_filter(filter));
    #[cfg(feature = "otel")]
    let registry = registry.with(serving.then(export::layer).flatten());
    registry.init();
}

/// Sends what is still to be sent; called before the process ends.
pub(super) fn flush() {
    #[cfg(feature = "otel")]
    export::flush();
}

/// Spans of requests and steps, over OTLP. `OTEL_EXPORTER_OTLP_ENDPOINT` says where to; without it nothing
/// is sent. The other `OTEL_*` variables of the OTLP exporter apply.
#[cfg(feature = "otel")]
mod export {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use std::sync::OnceLock;
    use tracing::Subscriber;
    use tracing_subscriber::registry::LookupSpan;
    use tracing_subscriber::{EnvFilter, Layer};

    static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

    pub(super) fn layer<S>() -> Option<impl Layer<S>>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT")?;
        let exporter = match opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .build()
        {
            Ok(exporter) => exporter,
            Err(error) => {
                eprintln!("error: no spans are exported: {error}");
                return None;
            }
        };
        let resource = Resource::builder().with_service_name("kigo").build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("kigo");
        let _ = PROVIDER.set(provider);
        // Steps are debug spans.
        let filter = EnvFilter::new("kigo=debug");
        Some(
            tracing_opentelemetry::layer()
                .with_tracer(tracer)
                .with_filter(filter),
        )
    }

    pub(super) fn flush() {
        if let Some(provider) = PROVIDER.get()
            && let Err(error) = provider.shutdown()
        {
            eprintln!("error: the last spans were not exported: {error}");
        }
    }
}
