//! `kigo serve`.

use super::{Common, load, positive, print_json, stdout_error};
use crate::error::{Error, Result};
use crate::server::{Config, Server};
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// The port to listen on; 0 picks a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Tokens one request may generate at most [default: what its prompt leaves of the context]
    #[arg(long, value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
}

pub(super) fn run(common: &Common, args: &ServeArgs, out: &mut dyn Write) -> Result<()> {
    let file = load::open_to_run(common)?;
    let engine = load::engine(common, &file, 0)?;
    let device = engine.device().clone();
    let model = engine.model().name.clone();
    let address = SocketAddr::new(args.host, args.port);
    let io = |source| Error::Io {
        path: address.to_string().into(),
        source,
    };
    let runtime = tokio::runtime::Runtime::new().map_err(io)?;
    runtime.block_on(async {
        let config = Config {
            max_tokens: args.max_tokens,
        };
        let server = Server::bind(address, engine, config).await.map_err(io)?;
        let url = server.url();
        if common.json {
            print_json(
                out,
                &json!({ "url": url, "model": model, "device": device.name }),
            )?;
        } else {
            writeln!(out, "{model} on {}: {url}", device.name).map_err(stdout_error)?;
        }
        out.flush().map_err(stdout_error)?;
        server.run(stop_signal()).await;
        Ok(())
    })
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
