//! Whether a file will run, on which device, in how much memory; without loading it.

use super::loading;
use super::plan::Plan;
use super::{DeviceChoice, LoadOptions, MAX_ROWS};
use crate::device::cpu::{self, Cpu};
use crate::device::gpu::{self, Gpu};
use crate::device::{
    Attention, Batch, CachePlace, CacheShape, Device, DeviceInfo, Experts, GateUp, Head, Linear,
    Qkv, Residual, SampleRow,
};
use crate::error::{Error, Result};
use crate::tokenizer::{self, ChatTemplate};
use gguf::Gguf;
use serde::Serialize;
use std::ops::Range;
use std::sync::Arc;

/// What is to be expected of a file on one device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// `cuda`, `cpu` or `emulated`.
    pub backend: &'static str,
    /// The device's own name; none where there is no such device.
    pub device: Option<String>,
    pub runs: bool,
    /// The first reason why it will not run.
    pub reason: Option<String>,
    /// Tokens of the KV cache that `required_bytes` is for.
    pub context: Option<usize>,
    pub weights_bytes: Option<u64>,
    pub cache_bytes: Option<u64>,
    pub working_bytes: Option<u64>,
    /// All of them.
    pub required_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
}

/// A verdict for each device in question: the one asked for, or for [`DeviceChoice::Auto`] the first CUDA
/// device, if there is one, and the CPU.
pub fn verdicts(file: &Arc<Gguf>, options: &LoadOptions) -> Vec<Verdict> {
    let cuda = |index| match Gpu::cuda(index, options.exact) {
        Ok(device) => found(&device),
        Err(error) => Err(error),
    };
    let cpu = || Cpu::new(Some(1), options.exact).and_then(|device| found(&device));
    let mut all = Vec::new();
    match options.device {
        DeviceChoice::Cuda(index) => all.push(("cuda", cuda(index))),
        DeviceChoice::Emulated => {
            let device = Gpu::emulated(options.exact).and_then(|device| found(&device));
            all.push(("emulated", device));
        }
        DeviceChoice::Cpu => all.push(("cpu", cpu())),
        DeviceChoice::Auto => {
            let device = cuda(0);
            if !matches!(device, Err(Error::NoDevice(_))) {
                all.push(("cuda", device));
            }
            all.push(("cpu", cpu()));
        }
    }
    let text = check_text(file);
    all.into_iter()
        .map(|(backend, device)| {
            let plan = match backend {
                "cpu" => loading::rehearse(Dry::<false>, file, options),
                _ => loading::rehearse(Dry::<true>, file, options),
            };
            judge(backend, device, plan, &text)
        })
        .collect()
}

/// Name and free memory of a device.
fn found(device: &impl Device) -> Result<(String, u64)> {
    Ok((device.info().name.clone(), device.free_bytes()?))
}

/// Why text cannot be turned into tokens, if it cannot.
fn check_text(file: &Gguf) -> Option<String> {
    let tokenizer = tokenizer::check_text(file.metadata()).err();
    let template = ChatTemplate::from_gguf(file).err();
    tokenizer.or(template).map(|e| e.to_string())
}

fn judge(
    backend: &'static str,
    device: Result<(String, u64)>,
    plan: Result<Plan>,
    text: &Option<String>,
) -> Verdict {
    // What is wrong with the file comes before what is wrong with the machine.
    let mut reason = plan.as_ref().err().map(ToString::to_string);
    reason = reason.or_else(|| text.clone());
    reason = reason.or_else(|| device.as_ref().err().map(ToString::to_string));
    let (plan, device) = (plan.ok(), device.ok());
    if let (None, Some(plan), Some((_, free))) = (&reason, &plan, &device)
        && plan.total() > *free
    {
        reason = Some(format!(
            "it needs {} MiB and {} MiB are free",
            plan.total() >> 20,
            free >> 20
        ));
    }
    Verdict {
        backend,
        runs: reason.is_none(),
        reason,
        context: plan.map(|p| p.context),
        weights_bytes: plan.map(|p| p.weights),
        cache_bytes: plan.map(|p| p.cache),
        working_bytes: plan.map(|p| p.working),
        required_bytes: plan.map(|p| p.total()),
        free_bytes: device.as_ref().map(|d| d.1),
        device: device.map(|d| d.0),
    }
}

/// A device that checks what it is given and keeps nothing.
struct Dry<const GPU: bool>;

/// The answer to what only a real device can do.
fn dry<T>() -> Result<T> {
    Err(Error::Request("a rehearsal runs nothing".into()))
}

impl<const GPU: bool> Device for Dry<GPU> {
    /// Rows and columns.
    type Weight = (usize, usize);
    type Buffer = ();
    type Cache = ();
    const STEP_ROWS: usize = if GPU { MAX_ROWS } else { Cpu::STEP_ROWS };
    const MAX_BATCH: usize = 1;

    fn info(&self) -> &DeviceInfo {
        static INFO: DeviceInfo = DeviceInfo {
            backend: "none",
            name: String::new(),
            memory_bytes: 0,
            memory_bytes_per_s: None,
            architecture: String::new(),
        };
        &INFO
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(u64::MAX)
    }

    fn working_bytes(&self, widest: usize) -> u64 {
        if GPU { gpu::working_bytes(widest) } else { 0 }
    }

    fn load(
        &mut self,
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        _: &Arc<Gguf>,
    ) -> Result<(usize, usize)> {
        let (known, who) = if GPU {
            (gpu::reads(tensor.ty()), "the GPU kernels do not read")
        } else {
            (cpu::multiplies(tensor.ty()), "the CPU cannot multiply")
        };
        if !known {
            return Err(Error::Model {
                file: tensor.path().to_owned(),
                what: format!(
                    "tensor {} has type {}, which {who}",
                    tensor.name(),
                    tensor.ty()
                ),
            });
        }
        Ok((rows.len(), tensor.row_len() as usize))
    }

    fn finish_loading(&mut self) -> Result<()> {
        Ok(())
    }

    fn shape(weight: &(usize, usize)) -> (usize, usize) {
        *weight
    }

    fn upload(&mut self, _: &[f32]) -> Result<()> {
        Ok(())
    }

    fn alloc(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<()> {
        if GPU { gpu::check_cache(shape) } else { Ok(()) }
    }

    fn step(&mut self, _: &Batch, _: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        dry()
    }

    fn embed(&mut self, _: &(usize, usize), _: f32, _: &mut ()) -> Result<()> {
        dry()
    }

    fn norm_qkv(
        &mut self,
        _: &(),
        _: &Qkv<'_, Self>,
        _: &mut (),
        _: CachePlace,
        _: &mut (),
    ) -> Result<()> {
        dry()
    }

    fn attend(
        &mut self,
        _: &(),
        _: &(),
        _: CachePlace,
        _: &Attention<'_, Self>,
        _: &mut (),
    ) -> Result<()> {
        dry()
    }

    fn linear_add(
        &mut self,
        _: Linear<'_, Self>,
        _: &(),
        _: &Residual<'_, Self>,
        _: &mut (),
    ) -> Result<()> {
        dry()
    }

    fn norm_gate_up(&mut self, _: &(), _: &GateUp<'_, Self>, _: &mut ()) -> Result<()> {
        dry()
    }

    fn experts(&mut self, _: &Experts<'_, Self>, _: &mut ()) -> Result<()> {
        dry()
    }

    fn norm_head(&mut self, _: &(), _: &Head<'_, Self>, _: &mut ()) -> Result<()> {
        dry()
    }

    fn sample(&mut self, _: &(), _: usize, _: &[SampleRow<'_>]) -> Result<Vec<u32>> {
        dry()
    }

    fn read(&mut self, _: &(), _: usize, _: &mut [f32]) -> Result<()> {
        dry()
    }
}
