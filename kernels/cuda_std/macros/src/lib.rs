//! Macros of [`cuda_std`](../cuda_std/index.html): `#[kernel]`, `kernels!` and the name of a static
//! shared array.

use proc_macro::TokenStream;
use proc_macro2::{Span, TokenStream as Tokens};
use quote::{format_ident, quote, quote_spanned};
use std::sync::atomic::{AtomicU32, Ordering};
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{FnArg, Ident, ItemFn, LitInt, Path, ReturnType, Token, parse_macro_input};

/// `launch_bounds(max_threads)` or `launch_bounds(max_threads, min_blocks_per_sm)`.
#[derive(Clone, Copy, Default)]
struct LaunchBounds {
    max_threads: u32,
    min_blocks: u32,
}

impl Parse for LaunchBounds {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        if input.is_empty() {
            return Ok(Self::default());
        }
        let name: Ident = input.parse()?;
        if name != "launch_bounds" {
            return Err(syn::Error::new(
                name.span(),
                "expected `launch_bounds(max_threads[, min_blocks])`",
            ));
        }
        let content;
        syn::parenthesized!(content in input);
        let numbers = Punctuated::<LitInt, Token![,]>::parse_terminated(&content)?;
        let mut numbers = numbers.iter();
        let max = numbers.next().ok_or_else(|| {
            syn::Error::new(
                name.span(),
                "launch_bounds needs the largest number of threads per block",
            )
        })?;
        let bounds = Self {
            max_threads: max.base10_parse()?,
            min_blocks: numbers
                .next()
                .map(|n| n.base10_parse())
                .transpose()?
                .unwrap_or(0),
        };
        if bounds.max_threads == 0 || bounds.max_threads > 1024 {
            return Err(syn::Error::new(max.span(), "a block has 1 to 1024 threads"));
        }
        if let Some(extra) = numbers.next() {
            return Err(syn::Error::new(
                extra.span(),
                "launch_bounds takes at most two numbers",
            ));
        }
        Ok(bounds)
    }
}

/// Marks a function as a kernel entry.
///
/// On the device the function becomes a PTX `.entry` of its own name. On the host it stays a plain
/// function, and a constant `__KERNEL_<name>` beside it lets the emulator launch it with the same
/// parameter array that `cuLaunchKernel` takes.
///
/// `#[kernel(launch_bounds(max_threads, min_blocks_per_sm))]` bounds the registers `ptxas` may
/// use; the emulator refuses larger blocks. Parameters: raw pointers, integers, floats, and
/// `#[repr(C)] Copy` structs by value, 4,096 bytes in all. The body may use unsafe operations
/// without an `unsafe` block.
#[proc_macro_attribute]
pub fn kernel(attr: TokenStream, item: TokenStream) -> TokenStream {
    let bounds = parse_macro_input!(attr as LaunchBounds);
    let function = parse_macro_input!(item as ItemFn);
    expand_kernel(bounds, function)
        .unwrap_or_else(|e| e.to_compile_error())
        .into()
}

fn expand_kernel(bounds: LaunchBounds, function: ItemFn) -> syn::Result<Tokens> {
    let ItemFn {
        attrs,
        vis,
        sig,
        block,
    } = function;
    if !sig.generics.params.is_empty() {
        return Err(syn::Error::new(
            sig.generics.span(),
            "a kernel entry cannot be generic: write a generic device function and instantiate entries with macro_rules!",
        ));
    }
    if !matches!(&sig.output, ReturnType::Default) {
        return Err(syn::Error::new(
            sig.output.span(),
            "a kernel returns nothing",
        ));
    }
    let mut types = Vec::new();
    for input in &sig.inputs {
        match input {
            FnArg::Typed(arg) => types.push((*arg.ty).clone()),
            FnArg::Receiver(r) => return Err(syn::Error::new(r.span(), "a kernel has no self")),
        }
    }
    let name = &sig.ident;
    let inputs = &sig.inputs;
    let entry = format_ident!("__KERNEL_{}", name, span = name.span());
    let name_text = name.to_string();
    let LaunchBounds {
        max_threads,
        min_blocks,
    } = bounds;
    let marker = if max_threads > 0 {
        // cuda_builder turns this comment into `.maxntid` and `.minnctapersm`.
        let text = format!("// cuda_std launch_bounds {max_threads} {min_blocks}");
        quote! { ::core::arch::asm!(#text, options(nomem, nostack, preserves_flags)); }
    } else {
        quote! {}
    };
    let index = 0..types.len();
    let statements = &block.stmts;
    let copy_check = types
        .iter()
        .map(|t| quote_spanned! { t.span() => parameter::<#t>(); });
    Ok(quote! {
        #[cfg(target_arch = "nvptx64")]
        #(#attrs)*
        #[unsafe(no_mangle)]
        #[allow(unsafe_op_in_unsafe_fn, improper_ctypes_definitions)]
        #vis unsafe extern "ptx-kernel" fn #name(#inputs) {
            #[allow(unused_unsafe)]
            unsafe { #marker }
            #(#statements)*
        }

        #[cfg(not(target_arch = "nvptx64"))]
        #(#attrs)*
        #[allow(unsafe_op_in_unsafe_fn)]
        #vis unsafe fn #name(#inputs) {
            #(#statements)*
        }

        #[cfg(not(target_arch = "nvptx64"))]
        #[doc(hidden)]
        #[allow(non_upper_case_globals)]
        pub const #entry: ::cuda_std::emulator::Kernel = {
            const fn parameter<T: Copy>() {}
            const _: () = { #(#copy_check)* };
            unsafe fn call(params: *const *const ::core::ffi::c_void) {
                let _ = params;
                unsafe { #name(#((*params.add(#index)).cast::<#types>().read_unaligned()),*) }
            }
            ::cuda_std::emulator::Kernel {
                name: #name_text,
                call,
                params: &[#(::core::mem::size_of::<#types>()),*],
                max_threads: #max_threads,
                min_blocks: #min_blocks,
            }
        };
    })
}

/// `kernels![module::name, …]` defines `pub fn all() -> &'static [cuda_std::emulator::Kernel]`,
/// the emulator's list of entries, on the host; nothing on the device.
#[proc_macro]
pub fn kernels(input: TokenStream) -> TokenStream {
    let paths = parse_macro_input!(input with Punctuated::<Path, Token![,]>::parse_terminated);
    let entries = paths.into_iter().map(|mut path| {
        if let Some(last) = path.segments.last_mut() {
            last.ident = format_ident!("__KERNEL_{}", last.ident, span = last.ident.span());
        }
        path
    });
    quote! {
        /// Every kernel entry, for the emulator.
        #[cfg(not(target_arch = "nvptx64"))]
        pub fn all() -> &'static [::cuda_std::emulator::Kernel] {
            const ALL: &[::cuda_std::emulator::Kernel] = &[#(#entries),*];
            ALL
        }
    }
    .into()
}

static SHARED_ARRAYS: AtomicU32 = AtomicU32::new(0);

struct SharedArray {
    element: syn::Type,
    length: syn::Expr,
}

impl Parse for SharedArray {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let element = input.parse()?;
        input.parse::<Token![;]>()?;
        Ok(Self {
            element,
            length: input.parse()?,
        })
    }
}

/// `shared_array![T; N]`: a static array in shared memory, as `*mut T`, 128-byte aligned.
///
/// One array per place in the source; `T` and `N` must be known where the enclosing module is: no
/// generic parameters (use dynamic shared memory there), no constants of the function's body. Its contents are undefined at the start of a block.
#[proc_macro]
pub fn shared_array(input: TokenStream) -> TokenStream {
    expand_shared_array(parse_macro_input!(input as SharedArray), false)
}

/// `shared_static![T; N]`: like `shared_array!`, as a `cuda_std::shared::SharedPtr<T>`.
#[proc_macro]
pub fn shared_static(input: TokenStream) -> TokenStream {
    expand_shared_array(parse_macro_input!(input as SharedArray), true)
}

fn expand_shared_array(SharedArray { element, length }: SharedArray, typed: bool) -> TokenStream {
    let number = SHARED_ARRAYS.fetch_add(1, Ordering::Relaxed);
    let krate = std::env::var("CARGO_CRATE_NAME").unwrap_or_else(|_| "crate".into());
    let symbol = Ident::new(&format!("__shared_{krate}_{number}"), Span::call_site());
    let declare = format!(".shared .align 128 .b8 {symbol}[{{}}];");
    let take = format!("mov.u32 {{0}}, {symbol};");
    let result = if typed {
        quote! { address }
    } else {
        quote! { address.as_ptr() }
    };
    quote! {{
        #[cfg(target_arch = "nvptx64")]
        {
            // A declaration in the module's scope: one in the function's body would be copied with
            // it wherever LLVM inlines or unrolls. global_asm! is allowed in a module only.
            mod declaration {
                #[allow(unused_imports)]
                use super::*;
                ::core::arch::global_asm!(#declare, const ::core::mem::size_of::<[#element; #length]>());
            }
            let address: u32;
            #[allow(unused_unsafe)]
            unsafe {
                ::core::arch::asm!(#take, out(reg32) address, options(pure, nomem, nostack, preserves_flags));
            }
            let address = ::cuda_std::shared::SharedPtr::<#element>::from_addr(address);
            #result
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            // Its address tells this array from every other.
            static KEY: ::core::sync::atomic::AtomicU32 = ::core::sync::atomic::AtomicU32::new(#number);
            let address = ::cuda_std::emulator::static_shared::<[#element; #length]>(&KEY).cast::<#element>();
            #result
        }
    }}
    .into()
}
