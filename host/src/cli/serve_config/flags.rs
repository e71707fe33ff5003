//! Every setting as a flag, a variable and a line of a file.

use super::super::positive;
use crate::server::{Config, EngineSlot, Server};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum LogFormat {
    Human,
    Json,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct ServeArgs {
    /// A TOML file with any of these settings, named as the flags are, with underscores
    #[arg(long, env = "KIGO_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Print the settings as TOML, and where the worker would listen, and do nothing else
    #[arg(long)]
    pub print_config: bool,
    #[command(flatten)]
    pub(super) flags: Flags,
}

/// Every setting, wherever it comes from.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Flags {
    /// The worker's name among others [default: the host's name]
    #[arg(long, env = "KIGO_WORKER_ID", value_name = "ID")]
    pub(super) worker_id: Option<String>,
    /// The CUDA device to use, by number; the same as --device cuda:N
    #[arg(long, env = "KIGO_GPU_DEVICE", value_name = "N")]
    pub(super) gpu_device: Option<usize>,
    /// The address to listen on [default: 127.0.0.1]
    #[arg(long, env = "KIGO_HOST", value_name = "IP")]
    pub(super) host: Option<IpAddr>,
    /// The port to listen on; 0 picks a free one [default: 8080]
    #[arg(long, env = "KIGO_PORT")]
    pub(super) port: Option<u16>,
    /// Listen here instead: IP:PORT, or unix:PATH
    #[arg(long, env = "KIGO_LISTEN", value_name = "ADDRESS")]
    pub(super) listen: Option<Listen>,
    /// POST here what the worker is, once it is up
    #[arg(long, env = "KIGO_CALLBACK_URL", value_name = "URL")]
    pub(super) callback_url: Option<String>,
    /// Tokens a prompt may have [default: what the context holds]
    #[arg(long, env = "KIGO_MAX_TOKENS_IN", value_name = "N", value_parser = positive)]
    pub(super) max_tokens_in: Option<usize>,
    /// Tokens one request may generate [default: what its prompt leaves of the context]
    #[arg(long, alias = "max-tokens", env = "KIGO_MAX_TOKENS_OUT", value_name = "N", value_parser = positive)]
    pub(super) max_tokens_out: Option<usize>,
    /// Seconds from a request's arrival to its end at most [default: no limit]
    #[arg(long, env = "KIGO_INFERENCE_TIMEOUT_SEC", value_name = "S", value_parser = positive)]
    pub(super) inference_timeout_sec: Option<usize>,
    /// Size of the KV cache, all requests together [default: 32,768 tokens, in at most a quarter of the free memory]
    #[arg(long, env = "KIGO_KV_CACHE_SIZE_MB", value_name = "MB", value_parser = positive)]
    pub(super) kv_cache_size_mb: Option<usize>,
    /// Requests that may wait; further ones are refused with 429 [default: 256]
    #[arg(long, env = "KIGO_MAX_QUEUE", value_name = "N", value_parser = positive)]
    pub(super) max_queue: Option<usize>,
    /// Requests worked on at once, as far as the cache holds them [default: 1024]
    #[arg(long, env = "KIGO_MAX_RUNNING", value_name = "N", value_parser = positive)]
    pub(super) max_running: Option<usize>,
    /// Requests whose next tokens one step computes together; with 1 every token is, bit for bit, what it would be alone
    /// [default: 64 on a GPU, 1 on the CPU; at most that]
    #[arg(long, env = "KIGO_MAX_BATCH", value_name = "N", value_parser = positive)]
    pub(super) max_batch: Option<usize>,
    /// Requests from which on tokens are computed together; fewer take turns [default: what is faster, measured as the worker
    /// runs]
    #[arg(long, env = "KIGO_MIN_BATCH", value_name = "N", value_parser = positive)]
    pub(super) min_batch: Option<usize>,
    /// Seconds that running requests have after SIGTERM [default: 30]
    #[arg(long, env = "KIGO_DRAIN_TIMEOUT", value_name = "S")]
    pub(super) drain_timeout: Option<u64>,
    /// A file with API keys, one a line; every request must then bring one
    #[arg(long, env = "KIGO_API_KEY_FILE", value_name = "FILE")]
    pub(super) api_key_file: Option<PathBuf>,
    /// Listen beyond this machine without API keys
    #[arg(long, env = "KIGO_INSECURE")]
    pub(super) insecure: bool,
    /// An origin whose pages may use the API; may be given several times; * for all
    #[arg(
        long,
        env = "KIGO_CORS_ORIGIN",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub(super) cors_origin: Vec<String>,
    /// Connections at once [default: 4096]
    #[arg(long, env = "KIGO_MAX_CONNECTIONS", value_name = "N", value_parser = positive)]
    pub(super) max_connections: Option<usize>,
    /// Bytes of a request's body [default: 4194304]
    #[arg(long, env = "KIGO_MAX_BODY_BYTES", value_name = "N", value_parser = positive)]
    pub(super) max_body_bytes: Option<usize>,
    /// Seconds for a request's headers [default: 30]
    #[arg(long, env = "KIGO_HEADER_TIMEOUT_SEC", value_name = "S", value_parser = positive)]
    pub(super) header_timeout_sec: Option<usize>,
    /// Seconds that a connection may lie idle between two requests [default: 90]
    #[arg(long, env = "KIGO_IDLE_TIMEOUT_SEC", value_name = "S", value_parser = positive)]
    pub(super) idle_timeout_sec: Option<usize>,
    /// Seconds for a request's body [default: 30]
    #[arg(long, env = "KIGO_BODY_TIMEOUT_SEC", value_name = "S", value_parser = positive)]
    pub(super) body_timeout_sec: Option<usize>,
    /// Seconds that a client may take nothing of what is sent to it [default: 30]
    #[arg(long, env = "KIGO_WRITE_TIMEOUT_SEC", value_name = "S", value_parser = positive)]
    pub(super) write_timeout_sec: Option<usize>,
    /// How to write logs [default: human]
    #[arg(long, env = "KIGO_LOG_FORMAT", value_enum)]
    pub(super) log_format: Option<LogFormat>,
    // Those that every command has, for the file.
    #[arg(skip)]
    pub(super) model: Option<String>,
    #[arg(skip)]
    pub(super) device: Option<String>,
    #[arg(skip)]
    pub(super) exact: Option<bool>,
    #[arg(skip)]
    pub(super) threads: Option<usize>,
    #[arg(skip)]
    pub(super) ctx_size: Option<usize>,
    #[arg(skip)]
    pub(super) cache_type: Option<String>,
    #[arg(skip)]
    pub(super) lora: Vec<String>,
    #[arg(skip)]
    pub(super) template_fallback: bool,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::cli) enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: lacks a path".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => Err(format!("{text:?} is neither IP:PORT nor unix:PATH")),
            },
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Listen {
    pub async fn bind(&self, slot: EngineSlot, config: Config) -> io::Result<Server> {
        match self {
            Self::Tcp(address) => Server::bind(*address, slot, config).await,
            Self::Unix(path) => Server::bind_unix(path, slot, config).await,
        }
    }

    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}
