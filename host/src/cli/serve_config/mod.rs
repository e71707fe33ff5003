//! The settings of `kigo serve`: flags, then `KIGO_*` variables, then a TOML file, then defaults.

mod flags;

pub(super) use flags::{LogFormat, ServeArgs};

use super::Common;
use crate::device::CacheType;
use crate::engine::EngineConfig;
use crate::error::{Error, Result};
use crate::model::{CacheSize, DeviceChoice};
use crate::server::{Config, Limits};
use flags::{Flags, Listen};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

/// Tokens that the cache of a worker holds where memory allows and nobody says otherwise.
const DEFAULT_CACHE_TOKENS: usize = 32_768;

/// The settings in force.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    flags: Flags,
    common: Common,
    pub listen: Listen,
    pub callback_url: Option<String>,
    pub log_format: LogFormat,
}

/// `flag`, else what the file says, for each field.
macro_rules! prefer {
    ($flags:expr, $file:expr, $($field:ident),* $(,)?) => {
        $($flags.$field = $flags.$field.take().or($file.$field.take());)*
    };
}

impl Settings {
    /// # Errors
    /// A file that cannot be read, or has settings that are none.
    pub fn resolve(common: &Common, args: &ServeArgs) -> Result<(Common, Self)> {
        let mut file = match &args.config {
            Some(path) => read_toml(path)?,
            None => Flags::default(),
        };
        let mut flags = args.flags.clone();
        // Flags that name one place win over a file that names another.
        if flags.host.is_some() || flags.port.is_some() {
            file.listen = None;
        }
        prefer!(
            flags,
            file,
            worker_id,
            gpu_device,
            host,
            port,
            listen,
            callback_url,
            max_tokens_in,
            max_tokens_out,
            inference_timeout_sec,
            kv_cache_size_mb,
            max_queue,
            max_running,
            max_batch,
            min_batch,
            drain_timeout,
            api_key_file,
            max_connections,
            max_body_bytes,
            header_timeout_sec,
            idle_timeout_sec,
            body_timeout_sec,
            write_timeout_sec,
            log_format
        );
        flags.insecure |= file.insecure;
        if flags.cors_origin.is_empty() {
            flags.cors_origin = file.cors_origin;
        }
        let mut common = common.clone();
        common.model = common.model.or(file.model);
        common.threads = common.threads.or(file.threads);
        common.ctx_size = common.ctx_size.or(file.ctx_size);
        common.exact |= file.exact.unwrap_or(false);
        common.template_fallback |= file.template_fallback;
        if let (None, Some(ty)) = (common.cache_type, &file.cache_type) {
            common.cache_type = Some(ty.parse().map_err(Error::Request)?);
        }
        if common.lora.is_empty() {
            let adapters = file.lora.iter().map(|text| text.parse());
            common.lora = adapters.collect::<Result<_, _>>().map_err(Error::Request)?;
        }
        if common.device == DeviceChoice::Auto {
            if let Some(device) = &file.device {
                common.device = device.parse().map_err(Error::Request)?;
            }
            if let Some(n) = flags.gpu_device {
                common.device = DeviceChoice::Cuda(n);
            }
        } else if let Some(n) = flags.gpu_device
            && common.device != DeviceChoice::Cuda(n)
        {
            let what = format!("--gpu-device {n} and --device say different things; leave one out");
            return Err(Error::Request(what));
        }
        let host = flags.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let address = SocketAddr::new(host, flags.port.unwrap_or(8080));
        let listen = flags.listen.clone().unwrap_or(Listen::Tcp(address));
        let settings = Self {
            listen,
            callback_url: flags.callback_url.clone(),
            log_format: flags.log_format.unwrap_or(LogFormat::Human),
            common: common.clone(),
            flags,
        };
        Ok((common, settings))
    }

    /// # Errors
    /// Settings that do not go together.
    pub fn check(&self) -> Result<()> {
        if !self.listen.is_local() && self.flags.api_key_file.is_none() && !self.flags.insecure {
            return Err(Error::Request(format!(
                "{} can be reached from other machines; give --api-key-file, or --insecure to let \
                 everybody in",
                self.listen
            )));
        }
        if let Some(url) = &self.callback_url
            && !(url.starts_with("http://") || url.starts_with("https://"))
        {
            let what = format!("--callback-url is {url:?}, expected an http or https URL");
            return Err(Error::Request(what));
        }
        Ok(())
    }

    /// # Errors
    /// A key file that cannot be read, or has no keys.
    pub fn server_config(&self) -> Result<Config> {
        let f = &self.flags;
        let plain = Config::default();
        let limits = Limits::default();
        let seconds = |s: Option<usize>, default: Duration| {
            s.map_or(default, |s| Duration::from_secs(s as u64))
        };
        Ok(Config {
            worker_id: self.worker_id(),
            model_id: Some(self.model()),
            max_tokens_in: f.max_tokens_in,
            max_tokens_out: f.max_tokens_out,
            api_keys: match &f.api_key_file {
                Some(path) => read_keys(path)?,
                None => Vec::new(),
            },
            cors_origins: f.cors_origin.clone(),
            drain_timeout: f
                .drain_timeout
                .map_or(plain.drain_timeout, Duration::from_secs),
            limits: Limits {
                header_timeout: seconds(f.header_timeout_sec, limits.header_timeout),
                idle_timeout: seconds(f.idle_timeout_sec, limits.idle_timeout),
                body_timeout: seconds(f.body_timeout_sec, limits.body_timeout),
                write_timeout: seconds(f.write_timeout_sec, limits.write_timeout),
                max_connections: f.max_connections.unwrap_or(limits.max_connections),
                max_body: f.max_body_bytes.unwrap_or(limits.max_body),
            },
        })
    }

    pub fn engine_config(&self) -> (CacheSize, EngineConfig) {
        let f = &self.flags;
        let plain = EngineConfig::default();
        let cache = match f.kv_cache_size_mb {
            Some(mb) => CacheSize::Bytes((mb as u64) << 20),
            None => CacheSize::UpTo(DEFAULT_CACHE_TOKENS),
        };
        let config = EngineConfig {
            max_queue: f.max_queue.unwrap_or(plain.max_queue),
            max_running: f.max_running.unwrap_or(plain.max_running),
            max_batch: f.max_batch,
            min_batch: f.min_batch,
            timeout: f
                .inference_timeout_sec
                .map(|s| Duration::from_secs(s as u64)),
            ..plain
        };
        (cache, config)
    }

    fn worker_id(&self) -> String {
        self.flags.worker_id.clone().unwrap_or_else(|| {
            let name = rustix::system::uname();
            name.nodename().to_string_lossy().into_owned()
        })
    }

    fn model(&self) -> String {
        let default = || {
            crate::catalog::Catalog::builtin()
                .default_model()
                .name
                .clone()
        };
        self.common.model.clone().unwrap_or_else(default)
    }

    /// The settings as a TOML file that would say the same.
    pub fn shown(&self) -> String {
        let (cache, engine) = self.engine_config();
        let f = &self.flags;
        let config = Config::default();
        let limits = Limits::default();
        let mut table = toml::Table::new();
        let mut set = |name: &str, value: Option<toml::Value>| {
            if let Some(value) = value {
                table.insert(name.to_owned(), value);
            }
        };
        let number = |n: usize| Some(toml::Value::Integer(n as i64));
        let text = |t: String| Some(toml::Value::String(t));
        set("model", text(self.model()));
        set("device", text(device_name(self.common.device)));
        set("exact", Some(self.common.exact.into()));
        set("threads", self.common.threads.and_then(number));
        set("ctx_size", self.common.ctx_size.and_then(number));
        let ty = self.common.cache_type.map(CacheType::name);
        set("cache_type", ty.map(Into::into));
        let adapters = self.common.lora.iter().map(|l| l.to_string().into());
        set("lora", Some(adapters.collect::<Vec<toml::Value>>().into()));
        set(
            "template_fallback",
            Some(self.common.template_fallback.into()),
        );
        set("worker_id", text(self.worker_id()));
        set("listen", text(self.listen.to_string()));
        set("callback_url", self.callback_url.clone().and_then(text));
        set("max_tokens_in", f.max_tokens_in.and_then(number));
        set("max_tokens_out", f.max_tokens_out.and_then(number));
        set(
            "inference_timeout_sec",
            f.inference_timeout_sec.and_then(number),
        );
        if let CacheSize::Bytes(bytes) = cache {
            set("kv_cache_size_mb", number((bytes >> 20) as usize));
        }
        set("max_queue", number(engine.max_queue));
        set("max_running", number(engine.max_running));
        set("max_batch", engine.max_batch.and_then(number));
        set("min_batch", engine.min_batch.and_then(number));
        let drain = f.drain_timeout.unwrap_or(config.drain_timeout.as_secs());
        set("drain_timeout", number(drain as usize));
        let keys = f.api_key_file.as_ref().map(|p| p.display().to_string());
        set("api_key_file", keys.and_then(text));
        set("insecure", Some(f.insecure.into()));
        let origins: Vec<toml::Value> = f.cors_origin.iter().cloned().map(Into::into).collect();
        set("cors_origin", Some(origins.into()));
        set(
            "max_connections",
            number(f.max_connections.unwrap_or(limits.max_connections)),
        );
        set(
            "max_body_bytes",
            number(f.max_body_bytes.unwrap_or(limits.max_body)),
        );
        let seconds = |s: Option<usize>, d: Duration| number(s.unwrap_or(d.as_secs() as usize));
        set(
            "header_timeout_sec",
            seconds(f.header_timeout_sec, limits.header_timeout),
        );
        set(
            "idle_timeout_sec",
            seconds(f.idle_timeout_sec, limits.idle_timeout),
        );
        set(
            "body_timeout_sec",
            seconds(f.body_timeout_sec, limits.body_timeout),
        );
        set(
            "write_timeout_sec",
            seconds(f.write_timeout_sec, limits.write_timeout),
        );
        let format = match self.log_format {
            LogFormat::Human => "human",
            LogFormat::Json => "json",
        };
        set("log_format", text(format.to_owned()));
        table.to_string().trim_end().to_owned()
    }
}

fn device_name(device: DeviceChoice) -> String {
    match device {
        DeviceChoice::Auto => "auto".to_owned(),
        DeviceChoice::Cuda(n) => format!("cuda:{n}"),
        DeviceChoice::Cpu => "cpu".to_owned(),
        DeviceChoice::Emulated => "emulated".to_owned(),
    }
}

fn read_file(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })
}

fn read_toml(path: &Path) -> Result<Flags> {
    let text = read_file(path)?;
    toml::from_str(&text).map_err(|error| {
        let error = error.to_string();
        Error::Request(format!("{}: {}", path.display(), error.trim_end()))
    })
}

/// The keys of a file: a line each, without what is empty or begins with `#`.
fn read_keys(path: &Path) -> Result<Vec<String>> {
    let text = read_file(path)?;
    let lines = text.lines().map(str::trim);
    let keys: Vec<String> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        let what = "it has no keys; expected one a line";
        return Err(Error::Request(format!("{}: {what}", path.display())));
    }
    if keys.iter().any(|key| key.contains(char::is_whitespace)) {
        let what = "a key has white space in it; expected one a line";
        return Err(Error::Request(format!("{}: {what}", path.display())));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CacheType;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn settings(line: &str) -> Result<Settings> {
        let words = std::iter::once("serve").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).unwrap();
        Ok(Settings::resolve(&line.common, &line.serve)?.1)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kigo.toml");
        let text = "model = \"m\"\nport = 9000\nmax_queue = 7\ndrain_timeout = 3\ncors_origin = [\"http://a\"]\n\
                    cache_type = \"q8_0\"\nlora = [\"a.gguf:0.5\", \"b.gguf\"]\nidle_timeout_sec = 5\n\
                    max_batch = 3\nmin_batch = 5\n";
        std::fs::write(&path, text).unwrap();
        let s = settings(&format!("--config {} --max-queue 9", path.display())).unwrap();
        let (_, engine) = s.engine_config();
        assert_eq!(engine.max_queue, 9);
        assert_eq!(engine.max_batch, Some(3));
        assert_eq!(engine.min_batch, Some(5));
        assert_eq!(s.listen.to_string(), "127.0.0.1:9000");
        let config = s.server_config().unwrap();
        assert_eq!(config.drain_timeout, Duration::from_secs(3));
        assert_eq!(config.cors_origins, ["http://a"]);
        assert_eq!(config.model_id.as_deref(), Some("m"));
        assert_eq!(config.limits.idle_timeout, Duration::from_secs(5));
        assert_eq!(s.common.cache_type, Some(CacheType::Q8_0));
        let scales: Vec<f32> = s.common.lora.iter().map(|l| l.scale).collect();
        assert_eq!(scales, [0.5, 1.0]);

        // What is printed says the same when it is read.
        let printed = folder.path().join("printed.toml");
        std::fs::write(&printed, s.shown()).unwrap();
        let again = settings(&format!("--config {}", printed.display())).unwrap();
        assert_eq!(again.shown(), s.shown());

        std::fs::write(&path, "max_quue = 7").unwrap();
        let error = settings(&format!("--config {}", path.display())).unwrap_err();
        assert!(error.to_string().contains("max_quue"), "{error}");
    }

    #[test]
    fn the_file_may_say_what_every_command_takes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kigo.toml");
        let text = "template_fallback = true\ncache_type = \"q8_0\"\nlora = [\"a.gguf\", \"b.gguf:0.5\"]\n";
        std::fs::write(&path, text).unwrap();
        let s = settings(&format!("--config {}", path.display())).unwrap();
        assert!(s.common.template_fallback);
        assert_eq!(s.common.cache_type, Some(CacheType::Q8_0));
        assert_eq!(s.common.lora.len(), 2);
        let printed = folder.path().join("printed.toml");
        std::fs::write(&printed, s.shown()).unwrap();
        let again = settings(&format!("--config {}", printed.display())).unwrap();
        assert_eq!(again.shown(), s.shown());
        let s = settings(&format!(
            "--config {} --cache-type f16 --lora c.gguf",
            path.display()
        ))
        .unwrap();
        assert_eq!(s.common.cache_type, Some(CacheType::F16));
        assert_eq!(s.common.lora.len(), 1);

        std::fs::write(&path, "cache_type = \"q3\"").unwrap();
        let error = settings(&format!("--config {}", path.display())).unwrap_err();
        assert!(error.to_string().contains("q3"), "{error}");
    }

    #[test]
    fn how_many_go_together_is_the_devices_word_unless_somebody_says() {
        let s = settings("").unwrap();
        assert_eq!(s.engine_config().1.max_batch, None);
        assert!(!s.shown().contains("max_batch"));
        let s = settings("--max-batch 1").unwrap();
        assert_eq!(s.engine_config().1.max_batch, Some(1));
        assert!(s.shown().contains("max_batch = 1"));
        assert!(Line::try_parse_from(["serve", "--max-batch", "0"]).is_err());
    }

    #[test]
    fn from_how_many_on_they_go_together_is_measured_unless_somebody_says() {
        let s = settings("").unwrap();
        assert_eq!(s.engine_config().1.min_batch, None);
        assert!(!s.shown().contains("min_batch"));
        let s = settings("--min-batch 4").unwrap();
        assert_eq!(s.engine_config().1.min_batch, Some(4));
        assert!(s.shown().contains("min_batch = 4"));
        assert!(Line::try_parse_from(["serve", "--min-batch", "0"]).is_err());
    }

    #[test]
    fn other_machines_need_a_key_or_a_word() {
        assert!(settings("").unwrap().check().is_ok());
        assert!(settings("--listen unix:/tmp/kigo").unwrap().check().is_ok());
        let error = settings("--host 0.0.0.0").unwrap().check().unwrap_err();
        assert!(error.to_string().contains("--api-key-file"), "{error}");
        assert!(
            settings("--host 0.0.0.0 --insecure")
                .unwrap()
                .check()
                .is_ok()
        );
        assert!(
            settings("--callback-url orchestrator")
                .unwrap()
                .check()
                .is_err()
        );
    }

    #[test]
    fn the_gpu_is_a_device() {
        let s = settings("--gpu-device 3").unwrap();
        assert_eq!(s.common.device, DeviceChoice::Cuda(3));
        assert!(settings("--gpu-device 3 --device cpu").is_err());
    }

    #[test]
    fn a_key_file_has_a_key_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "# ours\nabc\n\n  def \n").unwrap();
        assert_eq!(read_keys(&path).unwrap(), ["abc", "def"]);
        std::fs::write(&path, "# none\n").unwrap();
        assert!(read_keys(&path).is_err());
    }
}
