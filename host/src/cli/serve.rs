//! `kigo serve`.

use super::serve_config::{LogFormat, ServeArgs, Settings};
use super::{Common, load, logs, print_json, stdout_error};
use crate::engine::{Code, EngineHandle, Failure};
use crate::error::{Error, Result};
use crate::server::{EngineSlot, WorkerInfo};
use serde_json::json;
use std::io::Write;
use std::time::Duration;

/// How often the orchestrator is told before it counts as gone.
const CALLBACK_ATTEMPTS: u32 = 6;
const CALLBACK_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn run(common: &Common, args: &ServeArgs, out: &mut dyn Write) -> Result<()> {
    let (common, settings) = Settings::resolve(common, args)?;
    if args.print_config {
        writeln!(out, "{}", settings.shown()).map_err(stdout_error)?;
        return Ok(());
    }
    settings.check()?;
    logs::init(true, settings.log_format == LogFormat::Json);
    raise_file_limit();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // They tokenize prompts. Hundreds of them at once would only be in each other's way, and the engine's.
        .max_blocking_threads(cores + 2)
        .build()
        .map_err(|source| Error::Io {
            path: "the async runtime".into(),
            source,
        })?;
    let served = runtime.block_on(serve(&common, &settings, out));
    let (served, failure) = match served {
        Ok(()) => (Ok(()), None),
        Err(Ended::Loading(error)) => {
            let failure = Failure::from_load_error(&error);
            (Err(error), Some(failure))
        }
        Err(Ended::Serving(error)) => {
            let failure = Failure::new(Code::Internal, error.to_string());
            (Err(error), Some(failure))
        }
    };
    // What still computes must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    logs::flush();
    if let (Some(failure), true) = (failure, common.json) {
        print_json(out, &json!({ "error": failure }))?;
    }
    served
}

/// What a worker failed at.
enum Ended {
    /// At its model.
    Loading(Error),
    /// At anything else: its address, its settings, its orchestrator.
    Serving(Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Ended::Serving(error)
    }
}

async fn serve(common: &Common, settings: &Settings, out: &mut dyn Write) -> Result<(), Ended> {
    let config = settings.server_config()?;
    let slot = EngineSlot::default();
    let io = |source| Error::Io {
        path: settings.listen.to_string().into(),
        source,
    };
    let server = settings
        .listen
        .bind(slot.clone(), config.clone())
        .await
        .map_err(io)?;
    let url = server.url();
    tracing::info!(%url, "listening");
    let mut stop = std::pin::pin!(stop_signal());
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let mut serving = tokio::spawn(server.run(async {
        let _ = ended.await;
    }));

    let loading = {
        let (common, settings, slot) = (common.clone(), settings.clone(), slot.clone());
        tokio::task::spawn_blocking(move || load_engine(&common, &settings, &slot))
    };
    let engine = tokio::select! {
        loaded = loading => match loaded {
            Ok(engine) => engine.map_err(Ended::Loading)?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        },
        // Nothing runs yet that could be cut.
        () = &mut stop => return Ok(()),
        // `POST /shutdown`.
        _ = &mut serving => return Ok(()),
    };
    slot.fill(engine.clone());
    let info = WorkerInfo::new(&engine, &config, Some(url.clone()));
    if common.json {
        let line = json!({ "url": url, "model": engine.model().name, "device": engine.device().name,
            "worker_id": config.worker_id });
        print_json(out, &line)?;
    } else {
        let (model, device) = (&engine.model().name, &engine.device().name);
        writeln!(out, "{model} on {device}: {url}").map_err(stdout_error)?;
    }
    out.flush().map_err(stdout_error)?;

    let mut told = Ok(());
    let callback = async {
        match &settings.callback_url {
            Some(callback) => call_back(callback, &info).await,
            None => Ok(()),
        }
    };
    tokio::pin!(callback);
    let mut calling = true;
    loop {
        tokio::select! {
            result = &mut callback, if calling => {
                calling = false;
                told = result;
                if told.is_err() {
                    break;
                }
            }
            () = &mut stop => break,
            _ = &mut serving => return Ok(told?),
        }
    }
    drop(end);
    tokio::spawn(async {
        stop_signal().await;
        tracing::warn!("a second signal: exiting at once");
        std::process::exit(130);
    });
    let _ = serving.await;
    Ok(told?)
}

fn load_engine(common: &Common, settings: &Settings, slot: &EngineSlot) -> Result<EngineHandle> {
    let file = load::open_to_run(common)?;
    let (cache, config) = settings.engine_config();
    load::engine_for_worker(common, &file, cache, config, &|progress| {
        slot.loaded(progress.bytes, progress.total_bytes);
    })
}

/// Tells the orchestrator that the worker is up; tries again with growing pauses.
async fn call_back(url: &str, info: &WorkerInfo) -> Result<()> {
    let failed = |what: String| {
        Error::Request(format!(
            "--callback-url {url}: {what}; the orchestrator must be reachable and answer with a 2xx status"
        ))
    };
    let client = reqwest::Client::builder()
        .timeout(CALLBACK_TIMEOUT)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    let mut pause = Duration::from_millis(250);
    let mut attempt = 1;
    loop {
        let what = match client.post(url).json(info).send().await {
            Ok(response) if response.status().is_success() => {
                tracing::info!(url, attempt, "the orchestrator knows of this worker");
                return Ok(());
            }
            Ok(response) => format!("it answered {}", response.status()),
            Err(error) => error.without_url().to_string(),
        };
        tracing::warn!(url, attempt, what, "callback");
        if attempt == CALLBACK_ATTEMPTS {
            return Err(failed(format!("{what} ({attempt} attempts)")));
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        attempt += 1;
    }
}

/// A worker may hold thousands of connections; the system's default is often 1024 files.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit on open files stays");
    }
}

/// Ctrl-C or SIGTERM.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => signal.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = terminated => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
